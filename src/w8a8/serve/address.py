"""The address a server listens on: taken before minutes of loading, or known to be free."""

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from w8a8.errors import PortInUseError


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket bound to `host` and `port` that does not listen yet, so that no client waits for an answer.

    Raises `PortInUseError`, which says why it cannot be bound and what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        raise PortInUseError(f"--host {host}: no such address ({error}); 127.0.0.1 is this machine alone") from error
    family, kind, _, _, address = found[0]
    with _refusals(host, port):
        listener = socket.socket(family, kind)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _refusals(host, port):
            listener.bind(address)
        yield listener


def check_address(host: str, port: int) -> None:
    """Try to listen on `host` and `port`. Raises `PortInUseError`, as `bound` does."""
    with bound(host, port) as probe, _refusals(host, port):
        probe.listen()


@contextmanager
def _refusals(host: str, port: int) -> Iterator[None]:
    """Turn an `OSError` into a `PortInUseError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.EADDRINUSE: f"port {port} is taken by another process; end that one, or give another --port",
            errno.EACCES: f"port {port} needs privileges; give a --port from 1024 up",
            errno.EADDRNOTAVAIL: "not an address of this machine; 127.0.0.1 is this machine alone",
        }.get(error.errno or 0, error.strerror)
        raise PortInUseError(f"{host}:{port} cannot be listened on: {reason}") from error
