"""w8a8 as a user runs it: in a process of its own."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.forking import Forked, can_fork
from w8a8.errors import W8A8Error

W8A8 = (sys.executable, "-m", "w8a8")
"""What a command line of w8a8 begins with, for tests that start a process and do not wait for its end."""

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def cli(
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = False,
    timeout: float | None = 400,
    obey_permissions: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run `w8a8 ARGS` to its end, see `python`; most often in a fork, see `tests/forking.py`."""
    arguments, environment = [*map(str, args)], {**os.environ, **(env or {})}
    if obey_permissions or not can_fork(arguments, environment):
        return python(
            *W8A8[1:], *args, env=env, stdin=stdin, check=check, timeout=timeout, obey_permissions=obey_permissions
        )
    process = Forked(arguments, environment, stdin)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    done = subprocess.CompletedProcess([*W8A8, *arguments], process.wait(), stdout, stderr)
    if check:
        done.check_returncode()
    return done


def python(
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    stdin: str | None = None,
    check: bool = False,
    timeout: float | None = 400,
    obey_permissions: bool = False,
) -> "subprocess.CompletedProcess[str]":
    """Run this Python to its end.

    `env` comes on top of this environment. `stdin` is all there is to read: nothing, unless given. `check` makes a
    failure an exception. With `obey_permissions` the rights of files hold even for root.
    """
    return subprocess.run(
        [sys.executable, *args],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        check=check,
        timeout=timeout,
        env={**os.environ, **(env or {})},
        preexec_fn=_give_up_overriding_permissions if obey_permissions else None,
    )


def assert_refused(
    source: str | Path,
    out: Path,
    error: type[W8A8Error],
    *mentions: str,
    env: Mapping[str, str] | None = None,
    obey_permissions: bool = False,
) -> None:
    """`quantize` ends with the exit code of `error` and one line with all `mentions`, and leaves nothing behind."""
    run = cli("quantize", source, out, "--quiet", env=env, obey_permissions=obey_permissions)
    assert run.returncode == error.exit_code, run.stderr
    [line] = run.stderr.splitlines()
    assert line.startswith("w8a8: error: ")
    assert [mention for mention in mentions if mention not in line] == [], line
    assert run.stdout == ""
    assert not out.exists()
    assert not (out.parent / f".{out.name}.w8a8").exists()


def _give_up_overriding_permissions() -> None:
    # Fails, and does no harm, for a user who has no such right to give up.
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
