"""Shared by all commands: the apps they belong to, their common options, and how they are interrupted."""

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer

from w8a8.errors import LimitError, OutputError, UsageError, W8A8Error
from w8a8.terminal.events import OPTION, event, logged

app = typer.Typer(
    name="w8a8",
    help="Turn a Hugging Face checkpoint into a verified INT8 W8A8 checkpoint that vLLM loads.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = typer.Typer(
    help="Measure how good a model is, and how far a quantized one is from it.", no_args_is_help=True
)
app.add_typer(eval_app, name="eval")
bench_app = typer.Typer(help="Measure this tool against its peers, on this machine.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices, only the result and errors.")]

LogJson = Annotated[
    bool,
    typer.Option(OPTION, help="Progress, notices and errors as JSON, a line each, on standard error (docs/large.md)."),
]

Workers = Annotated[
    int | None,
    typer.Option(min=1, max=64, help="Shards to work on at once.", show_default="one per core, at most 8"),
]

Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work on the nodes of a Ray cluster: `local` starts one here, `auto` joins the one that this machine "
        "belongs to, `host:port` that of this head. All nodes have to see SRC, and the folder that OUT is in.",
    ),
]


def parse_bytes(text: str, where: str) -> int:
    """Read a size such as `20GB` or `1.5TiB`. Raises `UsageError` that says `where` it stands."""
    match = re.fullmatch(r"(?P<number>\d{1,6}(\.\d{1,3})?) ?(?P<prefix>[MGT])(?P<binary>i?)B", text.strip())
    if match is None or not float(match["number"]):
        raise UsageError(f"{where}: {text!r} is no size; write it as 500MB, 20GB or 1.5TiB")
    return int(float(match["number"]) * (1024 if match["binary"] else 1000) ** ("MGT".index(match["prefix"]) + 2))


def engines() -> list[str]:
    """List the names that `--engine` takes."""
    from w8a8.serve.launch import ENGINES

    return list(ENGINES)


def dtypes() -> list[str]:
    """List the names that `--dtype` takes."""
    from w8a8.serve.vllm import DTYPES

    return list(DTYPES)


Dtype = Annotated[
    str,
    typer.Option(
        help="What the model computes in: `auto` (as stored), `bfloat16` or `float32`, which takes twice the memory.",
        autocompletion=dtypes,
    ),
]


@contextmanager
def interruptible(consequence: str) -> Iterator[None]:
    """End in order on Ctrl-C or SIGTERM, with 130 or 143, and say the consequence."""

    codes = [130]

    def terminate(_signal: int, frame: FrameType | None) -> None:
        """Do as Ctrl-C does: asyncio turns it into cancelling; an exception would surface in any of its tasks."""
        codes.append(143)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # Ctrl-C is ignored, as in the background of a script
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        if logged():
            event("interrupted", message=consequence, exit_code=codes[-1])
        else:
            print(f"\nw8a8: interrupted; {consequence}", file=sys.stderr)
        sys.exit(codes[-1])
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def showing(done: str) -> Iterator[None]:
    """Show a result of work that is `done`, whether or not it can be shown: an error of standard output says so."""
    try:
        yield
        sys.stdout.flush()
    except OutputError as error:
        raise type(error)(f"{str(error) or 'standard output was closed'}; {done}") from error


def about(error: W8A8Error) -> dict[str, Any]:
    """Give an error as plain JSON."""
    return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}


def complain(error: W8A8Error) -> None:
    """Say on standard error what went wrong, in one line; nothing where the error says nothing."""
    from w8a8.terminal.wording import printable

    if logged():
        event("error", **about(error))
    elif str(error):
        print(f"w8a8: error: {printable(str(error))}", file=sys.stderr)


def enforce(broken: str) -> None:
    """End with the code of a limit that is not held, if `broken` says why; the result has been printed."""
    if broken:
        complain(LimitError(broken))
        raise typer.Exit(LimitError.exit_code)
