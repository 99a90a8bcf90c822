"""Timing a whole process, and measuring its peak memory (maximum resident set, from the kernel).

A process inherits the peak of the process that it was forked from, so a child of a Python that has loaded NumPy never
seems to need less than NumPy. Each command is therefore started by a launcher that is small itself.
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

    @property
    def complaint(self) -> str:
        """The last line on standard error: of a process that failed, usually the reason."""
        return last_line(self.stderr)


def last_line(text: str) -> str:
    """Return the last line that is not empty; an empty string if there is none."""
    return (text.strip().splitlines() or [""])[-1]


def timed(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run `command` to its end; `environment` is added to this process's environment."""
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
