"""An engine in a process of its own: start it, hand on its output, wait for it, stop it with everything it forked.

The engine leads a session of its own, so that a terminal's Ctrl-C reaches this process alone, which then stops the
engine in order: SIGTERM to its first process, which ends its workers, and after a while SIGKILL to whatever is left of
the group. If this process itself is killed, a guard does the same: a small process that waits for the end of a pipe.
(A signal from the kernel at a parent's death would not do: while vLLM loads, SIGTERM makes it wait for its workers.)
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from threading import Thread
from typing import IO, NoReturn

from w8a8.errors import EngineError, MissingExtraError

GRACE_SECONDS = 20
"""Time for an engine to end by itself."""

LOADING_GRACE_SECONDS = 3
"""The same while it loads: it has nothing to finish yet, and vLLM would first load to the end."""

_GUARD = f"""
import os, signal, sys, time
sys.stdin.read()
for send, number, seconds in (os.kill, signal.SIGTERM, {LOADING_GRACE_SECONDS}), (os.killpg, signal.SIGKILL, 0):
    try:
        send(int(sys.argv[1]), number)
    except ProcessLookupError:
        pass
    time.sleep(seconds)
"""

_POLL_SECONDS = 0.3
_REQUEST_SECONDS = 5.0
_KEPT_BYTES = 64 * 1024
_TELLING = re.compile(r"\b\w*(?:Error|Exception|error): .*\S")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Engine:
    """A running engine; `running` makes one."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], log: IO[bytes] | None = None) -> None:
        """Start `argv` with this process's environment and `environment` on top; its output goes to `log`."""
        self._log = log
        self._started = time.monotonic()
        self._grace = LOADING_GRACE_SECONDS
        self._said = b""
        self._process = subprocess.Popen(
            argv,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(self._process.pid)]
        self._guard = subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True)
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_until_ready(self, host: str, port: int) -> float:
        """Wait for `GET /health` to answer 200; return the seconds since the start. Raises `EngineError`."""
        while not _healthy(host, port):
            self._wait(_POLL_SECONDS)
        self._grace = GRACE_SECONDS
        return time.monotonic() - self._started

    def wait(self) -> NoReturn:
        """Wait for its end, which is a failure. Raises `EngineError`."""
        while True:
            self._wait(_POLL_SECONDS)

    def stop(self) -> None:
        """End it and all it forked. Another interrupt (a second Ctrl-C) ends it without further grace."""
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.terminate()
                self._process.wait(self._grace)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._guard.kill()
            self._guard.wait()
            self._process.wait()
            self._listener.join(1)

    def _wait(self, seconds: float) -> None:
        """Wait for some time. Raises `EngineError` if it ends meanwhile."""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(seconds)
            self._listener.join(1)
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            where = "above" if self._log is None else f"in {self._log.name}"
            said = telling(self._said.decode(errors="replace"))
            raise EngineError(f"the engine {how}; all it said is {where}. {said}")

    def _listen(self) -> None:
        """Hand its output on, to standard error unless there is a log, and keep the end of it."""
        pipe = self._process.stdout
        assert pipe is not None
        while chunk := os.read(pipe.fileno(), 65536):
            self._said = (self._said + chunk)[-_KEPT_BYTES:]
            with suppress(OSError, ValueError):  # nobody listens; the engine must not stall for that
                to = self._log or sys.stderr.buffer
                to.write(chunk)
                to.flush()


@contextmanager
def running(argv: Sequence[str], environment: Mapping[str, str], *, log: IO[bytes] | None = None) -> Iterator[Engine]:
    """Start an engine, and stop it at the end, whatever the reason. Raises `MissingExtraError`."""
    try:
        engine = Engine(argv, environment, log)
    except OSError as error:
        raise MissingExtraError(f"{argv[0]} cannot be started: {error.strerror}; is vLLM installed whole?") from error
    try:
        yield engine
    finally:
        engine.stop()


def telling(said: str) -> str:
    """Say why an engine ended, by its own words: its last errors, the cause first; else its last lines."""
    lines = [line for line in _COLOUR.sub("", said).splitlines() if line.strip()]
    errors = [match[0] for line in lines if "WARNING" not in line and (match := _TELLING.search(line))]
    chosen = list(dict.fromkeys(errors))[-3:] or [line.strip() for line in lines[-3:]]
    return "In short: " + " / ".join(chosen) if chosen else "It said nothing."


def _healthy(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=_REQUEST_SECONDS)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
