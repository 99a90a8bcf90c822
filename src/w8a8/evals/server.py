"""The server to ask: one that is running, or a checkpoint that `w8a8 serve` serves meanwhile, as its own process."""

import secrets
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

from w8a8.errors import UsageError
from w8a8.evals.asking import Server
from w8a8.serve import launch, process
from w8a8.serve.calling import can_chat
from w8a8.serve.vllm import Options

HOST = "127.0.0.1"


@contextmanager
def connected(
    base_urls: Sequence[str],
    checkpoint: str | None,
    *,
    api_key: str | None,
    engine: str,
    dtype: str = "auto",
    completions: bool,
    timeout: float,
    notice: Callable[[str], None],
) -> Iterator[Server]:
    """Yield the servers at `base_urls`, or serve `checkpoint` meanwhile.

    Raises UsageError and what `serving` raises.
    """
    if checkpoint is not None:
        with serving(
            checkpoint, engine=engine, dtype=dtype, completions=completions, timeout=timeout, notice=notice
        ) as server:
            yield server
    else:
        key = api_key or "none"
        if not (key.isascii() and key.isprintable()):
            raise UsageError("the API key (--api-key or OPENAI_API_KEY) is not printable ASCII, which HTTP requires")
        first, *others = dict.fromkeys(map(_address, base_urls))
        yield Server(first, key, timeout, tuple(others))


@contextmanager
def serving(
    checkpoint: str,
    *,
    engine: str,
    dtype: str = "auto",
    completions: bool,
    timeout: float,
    notice: Callable[[str], None],
) -> Iterator[Server]:
    """Serve `checkpoint`, computing in `dtype`, with a new random key, and yield the server when it answers.

    Raises UsageError if the model should chat but has no chat template, EngineError, and what `serve` raises.
    """
    if not completions and not can_chat(checkpoint):
        raise UsageError(f"{checkpoint}: the model has no chat template; ask a base model with --completions")
    port = free_port()
    launch.prepare(checkpoint, engine=engine, options=Options(host=HOST, port=port, dtype=dtype), dry_run=True)
    key = secrets.token_urlsafe()
    command = (
        sys.executable,
        "-m",
        "w8a8",
        "serve",
        checkpoint,
        "--engine",
        engine,
        "--dtype",
        dtype,
        "--port",
        str(port),
    )
    with (
        NamedTemporaryFile(prefix="w8a8-serve-", suffix=".log", delete=False) as log,
        process.running(command, {"W8A8_API_KEY": key}, log=log) as served,
    ):
        notice(f"serving {checkpoint}; its log is {log.name} ...")
        notice(f"ready in {served.wait_until_ready(HOST, port):.0f} s")
        yield Server(f"http://{HOST}:{port}/v1", key, timeout)
    Path(log.name).unlink()  # after an error it stays


def _address(url: str) -> str:
    """Check `url`, and add the usual `/v1` if it has no path. Raises UsageError."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise UsageError(f"--base-url {url}: not an address such as http://localhost:8000/v1")
    return url if parts.path.strip("/") else parts._replace(path="/v1").geturl()


def free_port() -> int:
    """Return a port of localhost that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
