"""Servers for tests: a small HTTP server on threads of this process, and real ones in processes of their own.

Whatever runs in a process of its own writes all it says to a file, is waited for, and is ended with the test; a server
that does not become ready fails the test with what it said.
"""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Thread
from typing import TYPE_CHECKING
from urllib.request import urlopen

from tests.command import W8A8

if TYPE_CHECKING:
    from openai import OpenAI

READY_SECONDS = 240
"""How long a server may take to become ready: vLLM on two busy cores needs minutes."""

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


class _Threads(ThreadingHTTPServer):
    daemon_threads = True  # a connection that is kept open must not keep the test from ending


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with `handler` on threads of this process; yields the server's URL."""
    handler.disable_nagle_algorithm = True  # or a body waits 40 ms for its head to be acknowledged
    with _Threads(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """A port nobody listens on."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Running:
    """A process that a test started, and the file with all it says."""

    process: "subprocess.Popen[bytes]"
    output: Path

    def said(self) -> str:
        """All it has said so far, on either stream."""
        return self.output.read_text(errors="replace")

    def wait_until(self, ready: Callable[[], bool], what: str, seconds: float = READY_SECONDS) -> None:
        """Wait until `ready`; fails with what it said if it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not ready():
            ended = self.process.poll()
            assert ended is None or ready(), f"ended with {ended}, not {what}:\n{self.said()[-4000:]}"
            assert time.monotonic() < deadline, f"not {what} after {seconds:.0f} s:\n{self.said()[-4000:]}"
            time.sleep(0.1)

    def wait_for(self, text: str, seconds: float = READY_SECONDS) -> str:
        """What it has said once it has said `text`, to the end of a line."""
        self.wait_until(lambda: "\n" in self.said().partition(text)[2], f"said {text!r}", seconds)
        return self.said()

    def stop(self, code: int) -> None:
        """Ask it to end, which it does with `code`."""
        self.process.terminate()
        assert self.process.wait(60) == code, self.said()


@contextmanager
def started(
    command: Sequence[str | Path], output: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """`command` in a process of its own, with `environment` on top of this one; killed at the end if it still runs."""
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environment or {})})
    try:
        yield Running(process, output)
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Server(Running):
    """A server of OpenAI's API that is ready: where it is, the model it serves, and the key it wants."""

    port: int
    model: str
    key: str = "none"

    @property
    def url(self) -> str:
        """Its address, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def client(self) -> "OpenAI":
        """A client that has the key."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def healthy(self) -> bool:
        """Whether it answers."""
        try:
            with urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def served(
    checkpoint: Path, engine: str, output: Path, *, environment: Path | None = None, arguments: tuple[str, ...] = ()
) -> Iterator[Server]:
    """`w8a8 serve CHECKPOINT --engine ENGINE`, ready; `environment` is where the engine's programs are."""
    port = free_port()
    command: list[str | Path] = [*W8A8, "serve", checkpoint, "--engine", engine, "--port", str(port), *arguments]
    path = {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"} if environment else {}
    with started(command, output, OFFLINE | path) as running:
        server = Server(running.process, output, port, str(checkpoint))
        server.wait_until(server.healthy, "ready")
        yield server
        server.stop(143)
