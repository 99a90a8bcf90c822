"""The embedded engine: transformers' own OpenAI-compatible server, running one checkpoint with the W8A8 layer.

transformers' app, handlers and wire format (`transformers.cli.serving`) do the work. This room adds the rest: the model
is loaded before the first request, is the only one, and is listed by `/v1/models` (`handlers`); a request is checked
before it is run (`protocol`); requests are decoded together (`batching`, `stream`); a key, a limit of a request's size
and an end to answers nobody waits for (`guard`); and every error is the API's JSON. transformers' routes that load,
unload or fetch are removed.
"""

import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from w8a8.errors import EngineError, MissingExtraError
from w8a8.serve.address import bound

try:
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.server import build_server

    from w8a8.runtime.loading import engine_errors, quiet
    from w8a8.serve.embedded.batching import Batcher
    from w8a8.serve.embedded.guard import Guard
    from w8a8.serve.embedded.handlers import Chat, Completions, OneBatcher, OneModel
    from w8a8.serve.embedded.protocol import failure
except ImportError as missing:
    raise MissingExtraError(
        f"the transformers engine cannot be imported ({missing}); install it: pip install 'w8a8[serve]'"
    ) from missing

ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"}
SHUTDOWN_SECONDS = 5


def run(
    checkpoint: str,
    folder: Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    ready: Callable[[str], None],
    max_model_len: int | None = None,
) -> None:
    """Serve the checkpoint in `folder` as the model named `checkpoint`, until a signal ends it.

    `ready(checkpoint)` is called when requests can be answered. `max_model_len` is the context in tokens; without it,
    8192 or the model's own limit, whichever is less. Raises PortInUseError at once; EngineError, or the checkpoint's
    own error, when it cannot be loaded. A signal is raised again after everything was stopped.
    """
    with bound(host, port) as listener:
        server = _load(checkpoint, folder, api_key, lambda: ready(checkpoint), max_model_len)
        server.run(sockets=[listener])


@contextmanager
def running(checkpoint: str, folder: Path, *, api_key: str, max_model_len: int | None = None) -> Iterator[str]:
    """Serve the checkpoint on a thread of this process, on a free port of localhost; yield the API's base URL."""
    with bound("127.0.0.1", 0) as listener:
        started = threading.Event()
        server = _load(checkpoint, folder, api_key, started.set, max_model_len)
        logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
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

    def __init__(self, app: Any, batcher: Batcher, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=_log_config(),
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
                server_header=False,
                proxy_headers=False,
            )
        )
        self._batcher, self._ready = batcher, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._batcher.stop()
        await super().shutdown(sockets)
        self._batcher.join(SHUTDOWN_SECONDS)


def _load(
    name: str, folder: Path, api_key: str | None, ready: Callable[[], None], max_model_len: int | None
) -> _Server:
    quiet()
    with engine_errors(f"{name}: transformers cannot load it"):
        manager = OneModel(name, folder, max_model_len)
    batcher = Batcher(manager.model, manager.context)
    return _Server(Guard(_app(manager, batcher), api_key), batcher, ready)


def _app(manager: OneModel, batcher: Batcher) -> FastAPI:
    state = OneBatcher(batcher)
    chat, completions = Chat(manager, state), Completions(manager, state)
    app: FastAPI = build_server(manager, chat, completions, None, None, None, state)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _broken)
    return app


async def _refused(_: Request, error: Any) -> JSONResponse:
    return failure(error.status_code, str(error.detail))


async def _malformed(_: Request, error: Any) -> JSONResponse:
    return failure(400, f"the body is not a JSON object, sent as application/json: {error.errors()[0]['msg']}")


async def _broken(_: Request, error: Exception) -> JSONResponse:
    return failure(500, f"{type(error).__name__} in the server; its log has more")


def _log_config() -> dict[str, Any]:
    """Make uvicorn log to standard error alone: a line per request, none for starting and stopping."""
    config: dict[str, Any] = json.loads(json.dumps(uvicorn.config.LOGGING_CONFIG))
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["w8a8"] = {"handlers": ["default"], "level": "WARNING"}
    return config
