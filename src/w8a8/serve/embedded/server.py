"""The embedded engine: an OpenAI-compatible server for one checkpoint, run by transformers with the W8A8 layer.

The model is loaded before the first request (`model`). A request passes limits of connections (`connections`), of key,
size and time (`guard`), is checked (`protocol`), becomes the model's inputs beside the event loop (`prompts`,
`rendering`, `images`), is decoded together with others (`batching`, `stream`), and is answered, errors included, as the
API spells it (`handlers`, `answers`).
"""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from w8a8 import machine
from w8a8.checkpoint import Checkpoint
from w8a8.errors import DoesNotFitError, EngineError, MissingExtraError
from w8a8.machine import gigabytes
from w8a8.memory import ram_besides_cache
from w8a8.serve.address import bound

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    from w8a8.runtime.loading import quiet
    from w8a8.serve.embedded.batching import CHUNK, MAX_RUNNING, Batcher
    from w8a8.serve.embedded.connections import Connection
    from w8a8.serve.embedded.guard import Guard
    from w8a8.serve.embedded.handlers import Api
    from w8a8.serve.embedded.model import OneModel
    from w8a8.serve.embedded.prompts import Prompts
    from w8a8.serve.embedded.protocol import failure
except ImportError as missing:
    raise MissingExtraError(
        f"the transformers engine cannot be imported ({missing}); install it: pip install 'w8a8[serve]'"
    ) from missing

SHUTDOWN_SECONDS = 5

_log = logging.getLogger(__name__)


def run(
    checkpoint: str,
    folder: Path,
    *,
    headers: Checkpoint,
    host: str,
    port: int,
    api_key: str | None,
    ready: Callable[[str], None],
    max_model_len: int | None = None,
    dtype: str = "auto",
) -> None:
    """Serve the checkpoint in `folder`, whose `headers` are given, as the model `checkpoint`, until a signal ends it.

    `ready(checkpoint)` is called when requests can be answered. `max_model_len` is the context in tokens; without it,
    8192 or the model's own limit, whichever is less. `dtype` is what the model computes in ("auto": as stored).
    Raises PortInUseError at once; EngineError, or the checkpoint's own error, when it cannot be loaded. A signal is
    raised again after everything was stopped.
    """
    with bound(host, port) as listener:
        server = _load(checkpoint, folder, headers, api_key, lambda: ready(checkpoint), max_model_len, dtype)
        server.run(sockets=[listener])


@contextmanager
def running(
    checkpoint: str,
    folder: Path,
    *,
    headers: Checkpoint,
    api_key: str,
    max_model_len: int | None = None,
    dtype: str = "auto",
) -> Iterator[str]:
    """Serve the checkpoint on a thread of this process, on a free port of localhost; yield the API's base URL."""
    with bound("127.0.0.1", 0) as listener:
        started = threading.Event()
        server = _load(checkpoint, folder, headers, api_key, started.set, max_model_len, dtype)
        for name in ("uvicorn.access", "w8a8"):
            logging.getLogger(name).setLevel(logging.WARNING)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not started.wait(0.1):
            if not thread.is_alive():
                raise EngineError("the transformers engine ended before it could answer")
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join(SHUTDOWN_SECONDS)


class _Server(uvicorn.Server):
    """uvicorn that says when it listens, and ends running generations before it waits for their requests."""

    def __init__(self, app: Any, batcher: Batcher, prompts: Prompts, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=_log_config(),
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False,
                proxy_headers=False,
            )
        )
        self._batcher, self._prompts, self._ready = batcher, prompts, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            _log.info("%s", self._batcher.about)
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._batcher.stop()
        self._prompts.close()
        await super().shutdown(sockets)
        self._batcher.join(SHUTDOWN_SECONDS)


def _load(
    name: str,
    folder: Path,
    headers: Checkpoint,
    api_key: str | None,
    ready: Callable[[], None],
    max_model_len: int | None,
    dtype: str,
) -> _Server:
    quiet()
    free = machine.available_memory()
    model = OneModel(name, folder, max_model_len, dtype)
    batcher = Batcher(model.model, model.context, _room(model, headers, free, dtype))
    if not batcher.context:
        batcher.stop()
        raise DoesNotFitError(
            f"{name} leaves no RAM for a request: {gigabytes(free)} were available; end other programs, or take a "
            "smaller model"
        )
    model.context = batcher.context
    prompts = Prompts(name, model.model, model.processor, context=model.context, sees=model.sees)
    app = Starlette(
        routes=Api(model, batcher, prompts).routes, exception_handlers={HTTPException: _refused, Exception: _broken}
    )
    return _Server(Guard(app, api_key), batcher, prompts, ready)


def _room(model: OneModel, headers: Checkpoint, free: int, dtype: str) -> int | None:
    """Return the bytes of RAM for caches, of those that were `free` before the model was loaded.

    None, no limit, where it is on GPUs, to which transformers may have spread it.
    """
    if model.model.device.type != "cpu":
        return None
    return free - ram_besides_cache(headers, model.context if model.sees else CHUNK, MAX_RUNNING, dtype)


async def _refused(_: Request, error: Any) -> Response:
    return failure(error.status_code, str(error.detail), error.headers)


async def _broken(_: Request, error: Exception) -> Response:
    return failure(500, f"{type(error).__name__} in the server; its log has more")


def _log_config() -> dict[str, Any]:
    """Make uvicorn log to standard error alone: what the cache holds, and a line per request."""
    config: dict[str, Any] = json.loads(json.dumps(uvicorn.config.LOGGING_CONFIG))
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["w8a8"] = {"handlers": ["default"], "level": "INFO"}
    return config
