"""`python -m w8a8` as a user runs it."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from w8a8.errors import W8A8Error

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def python(
    *args: str | Path, env: Mapping[str, str] | None = None, obey_permissions: bool = False
) -> "subprocess.CompletedProcess[str]":
    """Run this Python; with `obey_permissions` the rights of files hold even for root."""
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=120,
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
    run = python("-m", "w8a8", "quantize", source, out, "--quiet", env=env, obey_permissions=obey_permissions)
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
