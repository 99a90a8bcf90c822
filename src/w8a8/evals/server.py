"""The server that is asked: one that runs, or `w8a8 serve` as a process of its own, for as long as it takes."""

import secrets
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

from w8a8.errors import UsageError
from w8a8.evals.gsm8k.asking import Server
from w8a8.serve import launch, process
from w8a8.serve.calling import can_chat
from w8a8.serve.vllm import Options

HOST = "127.0.0.1"


@contextmanager
def connected(
    base_url: str | None,
    checkpoint: str | None,
    *,
    api_key: str | None,
    engine: str,
    completions: bool,
    timeout: float,
    notice: Callable[[str], None],
) -> Iterator[Server]:
    """The server at `base_url` or, if that is `None`, `checkpoint` served for as long. Raises what `serving` raises."""
    if checkpoint is not None:
        with serving(checkpoint, engine=engine, completions=completions, timeout=timeout, notice=notice) as server:
            yield server
    else:
        key = api_key or "none"
        if not (key.isascii() and key.isprintable()):
            raise UsageError("the API key must be printable ASCII, or no request could carry it")
        yield Server(_address(base_url or ""), key, timeout)


@contextmanager
def serving(
    checkpoint: str, *, engine: str, completions: bool, timeout: float, notice: Callable[[str], None]
) -> Iterator[Server]:
    """`checkpoint` served, with a key that nobody else has.

    Raises `UsageError` where it would have to chat and cannot, what `serve` raises, and `EngineError`.
    """
    if not completions and not can_chat(checkpoint):
        raise UsageError(f"{checkpoint}: has no chat template; --completions asks a base model")
    port = _free_port()
    launch.prepare(checkpoint, engine=engine, options=Options(host=HOST, port=port), dry_run=True)
    key = secrets.token_urlsafe()
    command = (sys.executable, "-m", "w8a8", "serve", checkpoint, "--engine", engine, "--port", str(port))
    with (
        NamedTemporaryFile(prefix="w8a8-serve-", suffix=".log", delete=False) as log,
        process.running(command, {"W8A8_API_KEY": key}, log=log) as served,
    ):
        notice(f"serving {checkpoint}; its log is {log.name} ...")
        notice(f"ready in {served.wait_until_ready(HOST, port):.0f} s")
        yield Server(f"http://{HOST}:{port}/v1", key, timeout)
    Path(log.name).unlink()  # it stays where something went wrong


def _address(url: str) -> str:
    """`url` with the usual `/v1` where it has no path. Raises `UsageError` where it is no address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"--base-url {url}: not an address such as http://localhost:8000/v1")
    return url if parts.path.strip("/") else parts._replace(path="/v1").geturl()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
