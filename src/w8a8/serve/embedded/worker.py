"""Processes for what a checkpoint, or a request, may make endless: the kernel ends them.

Python cannot stop a thread in the middle of a pattern or of a power of large numbers. A process can have an alarm that
ends it, and a limit of memory. It reads a JSON object a line from standard input, and writes one for each.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

SECONDS = 5
"""The time that a request has in such a process."""

MEMORY_BYTES = 512 * 2**20
"""The memory that a request may take there, beside that of the process."""


class RefusedError(Exception):
    """The process could not do what it was asked for."""


class Worker:
    """A process that runs a function of this package; for one caller at a time."""

    def __init__(self, module: str, *arguments: int, files: Sequence[int] = ()) -> None:
        """Start `work(*arguments)` of w8a8.serve.embedded.`module`, which may read the open `files`.

        `closed` says whether it was ended for good.
        """
        self.closed = False
        self._program = f"from w8a8.serve.embedded.{module} import work; work({', '.join(map(str, arguments))})"
        self._files = files
        self._process = self._start()

    def ask(self, asked: Mapping[str, Any]) -> Any:
        """Return the answer. Raises RefusedError; a process that has ended is started again."""
        if self._process.poll() is not None and not self.closed:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(OSError):
            process.stdin.write(json.dumps(asked, default=str).encode() + b"\n")
            process.stdin.flush()
        if line := process.stdout.readline():
            answer = json.loads(line)
            if "refused" in answer:
                raise RefusedError(answer["refused"])
            return answer
        if process.wait() == -signal.SIGALRM:
            raise RefusedError(f"it did not end within {SECONDS} s")
        raise RefusedError("its process has ended: it needs too much memory")

    def read(self, count: int) -> bytes:
        """Return `count` bytes that follow an answer."""
        return self._process.stdout.read(count) if self._process.stdout else b""

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self.closed = True
        self._process.kill()
        self._process.wait()

    def _start(self) -> "subprocess.Popen[bytes]":
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
        return subprocess.Popen(
            [sys.executable, "-P", "-c", self._program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **quiet, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
            pass_fds=self._files,
            start_new_session=True,
        )


def limit_memory(more: int) -> None:
    """Let this process take `more` bytes than it has now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        taken = int(file.read().split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    least = taken + more if most == resource.RLIM_INFINITY else min(taken + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, least))


def answer_all(answer: Callable[[Any], tuple[Mapping[str, Any], bytes]]) -> None:
    """Answer what standard input asks for, until it ends: an object, and bytes behind it."""
    limit_memory(MEMORY_BYTES)
    for line in sys.stdin.buffer:
        signal.alarm(SECONDS)
        rest = b""
        try:
            said, rest = answer(json.loads(line))
        except BaseException as error:  # noqa: BLE001 - whatever a template does, and what panics in Rust
            said = {"refused": " ".join(str(error).split())[:500] or type(error).__name__}
        signal.alarm(0)
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
        sys.stdout.buffer.write(rest)
        sys.stdout.buffer.flush()
