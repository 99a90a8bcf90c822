"""w8a8 in processes of their own, forked from one that has imported it: most tests ask for less work than that is.

The first run of every command is started anew, as a user's is, and so is one whose variables are read too early.
"""

import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from select import select

ROOT = Path(__file__).parents[1]
IMPORTS = ("w8a8.cli", "w8a8.cli.tables", "w8a8.execute.run", "w8a8.quantization", "w8a8.verification.run")
LEFT_OUT = ("torch", "transformers", "huggingface_hub", "matplotlib", "fsspec")
"""What reads variables when it is imported; none of `IMPORTS` may bring it."""
EARLY = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "NUMBA_", "W8A8_CPU", "TMPDIR")
"""What the names of variables begin with that are read before or while `IMPORTS` are imported."""
MOST = 2**17
"""Bytes of a request."""
NUMBER = 12
"""Characters of a number that is told."""


_begun: set[tuple[str, ...]] = set()


def can_fork(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a fork does for `w8a8 ARGUMENTS`; counts as a run of that command."""
    groups = ("eval", "bench")
    command = tuple(arguments[: 2 if arguments[:1] and arguments[0] in groups else 1])
    if command not in _begun or command[:1] == ("bench",):  # which measures how long starting takes, and in what memory
        _begun.add(command)
        return False
    base = _server().environment
    changed = {name for name in {*base, *environment} if base.get(name) != environment.get(name)}
    return not any(name.startswith(EARLY) for name in changed)


class Forked:
    """`w8a8 ARGUMENTS` in a process of its own: as much of `subprocess.Popen` as tests need."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], stdin: str | None = None) -> None:
        self.args = [*arguments]
        self.returncode: int | None = None
        self._output = [os.memfd_create(name) for name in ("stdout", "stderr")]
        given = os.open(os.devnull, os.O_RDONLY) if stdin is None else os.memfd_create("stdin")
        if stdin is not None:
            os.write(given, stdin.encode())
            os.lseek(given, 0, os.SEEK_SET)
        self._told, told = os.pipe()
        request = json.dumps({"arguments": self.args, "environment": {**environment}, "folder": os.getcwd()})  # noqa: PTH109
        socket.send_fds(_server().requests, [request.encode()], [given, *self._output, told])
        os.close(given)
        os.close(told)
        self.pid = self._hear()

    def _hear(self) -> int:
        return int(os.read(self._told, NUMBER))

    def poll(self) -> int | None:
        """The exit code, if it has ended."""
        if self.returncode is None and select([self._told], [], [], 0)[0]:
            self.returncode = self._hear()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended; minus the signal that ended it."""
        if self.returncode is None:
            if not select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._hear()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All it says on standard output and on standard error until it has ended."""
        self.wait(timeout)
        os.close(self._told)
        out, err = map(_read, self._output)
        return out, err


def _read(descriptor: int) -> str:
    with os.fdopen(descriptor) as file:
        file.seek(0)
        return file.read()


@dataclass(frozen=True)
class _Server:
    """The process that forks for this one, the socket it listens on, and its environment."""

    process: "subprocess.Popen[bytes]"
    requests: socket.socket
    environment: Mapping[str, str]


@cache
def _server() -> _Server:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    environment = {**os.environ}
    with there:
        command, null = [sys.executable, "-m", __name__, str(there.fileno())], subprocess.DEVNULL
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=null, stdout=null, pass_fds=[there.fileno()]
        )
    return _Server(process, here, environment)


# --- the process that forks ---------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> None:
    """Fork for every request, until the tests end; returns in the forked process, which is then to be the command."""
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, MOST, 4)
        if not request:
            sys.exit()
        if not os.fork():
            break
        for descriptor in descriptors:
            os.close(descriptor)
    requests.close()
    *streams, told = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if command := os.fork():
        for descriptor in streams:
            os.close(descriptor)
        _tell(told, command)
        _tell(told, os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
        os._exit(0)
    os.close(told)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    asked = json.loads(request)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.path[0], sys.argv[1:] = asked["folder"], asked["arguments"]


def _tell(told: int, number: int) -> None:
    os.write(told, f"{number:{NUMBER}}".encode())


def main(requests: int) -> None:
    """Import, then fork for whoever asks on the socket `requests`."""
    for name in IMPORTS:
        import_module(name)
    assert not {*LEFT_OUT} & {*sys.modules}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for commands
    gc.freeze()
    serve(socket.socket(fileno=requests))
    runpy.run_module("w8a8", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
