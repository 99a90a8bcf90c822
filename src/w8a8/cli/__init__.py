"""The command line: parses, calls one function, prints. No logic lives here.

Results go to standard output (`--json` for machines), progress and notices to standard error. An error is one line on
standard error and an exit code of its own (see `w8a8.errors`); with `--json` it is JSON on standard output too.
"""

import gc
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from w8a8.cli.common import about, app, complain
from w8a8.errors import OutputError, UsageError, W8A8Error
from w8a8.version import __version__

# Importing these adds their commands, in the order of `--help`.
# isort: off
from w8a8.cli import making, running, evaluating, publishing, benching  # noqa: F401
# isort: on

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; every `W8A8Error` becomes one line and its exit code."""
    from w8a8.terminal.events import OPTION
    from w8a8.terminal.output import guard_streams

    gc.set_threshold(100_000, 20, 20)  # what is imported stays: looking it through again and again takes a while
    guard_streams()
    _reach_this_machine_directly()
    if {"--json", OPTION, "--quiet", "-q"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        try:
            _check_here()
            app()
        except SystemExit as end:
            try:
                sys.stdout.flush()
            except OutputError:
                if not end.code:  # any other code says more
                    raise
            raise
    except W8A8Error as error:
        if "--json" in sys.argv:
            with suppress(OutputError):
                print(json.dumps(about(error)), flush=True)
        complain(error)
        sys.exit(error.exit_code)


def _reach_this_machine_directly() -> None:
    """Keep every client here, and in what is started, from asking a proxy for this machine, which it cannot reach."""
    names = ("no_proxy", "NO_PROXY")
    known = next(filter(None, map(os.environ.get, names)), "")
    if known.strip() != "*" and any(name.lower().endswith("_proxy") for name in os.environ):
        os.environ.update(dict.fromkeys(names, ",".join(filter(None, (known, "localhost", "127.0.0.1", "::1")))))


def _check_here() -> None:
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise UsageError("the folder you are in was removed; go to one that is there") from error


def _version(value: bool) -> None:
    if value:
        print(f"w8a8 {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
