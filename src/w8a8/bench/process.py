"""Timing a whole process, and its peak memory as the kernel accounts it.

A process inherits the resident-set high-water mark of the one it was forked from, so a child of a Python that has
loaded NumPy seems never to need less than that. Each command is therefore started by a launcher that is small itself.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
process = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(process, 0)
os.write(int(sys.argv[1]), f"{time.perf_counter() - start} {usage.ru_maxrss}".encode())
sys.exit(os.waitstatus_to_exitcode(status) & 255)
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A finished process."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    peak_mib: float


def timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run `command` to its end, with `environment` added to this process's own."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as report:
        try:
            done = subprocess.run(
                [sys.executable, "-S", "-E", "-c", _LAUNCHER, str(writer), *command],
                env={**os.environ, **(environment or {})},
                pass_fds=(writer,),
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            os.close(writer)
        seconds, peak_kib = report.read().split()
    return Run(done.returncode, done.stdout, done.stderr, float(seconds), int(peak_kib) / 1024)
