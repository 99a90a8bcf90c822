"""The embedded engine: transformers' own OpenAI-compatible server, running one checkpoint with the W8A8 layer.

Its app, its handlers and its wire format (`transformers.cli.serving`) do the work. Around them is what they leave open:
the model is loaded before the first request and is the only one; `/v1/models` lists it; a request is checked before it
is run (`protocol`), requests are decoded together (`batching`); a key, a limit to what is read, an end to what nobody
waits for any more (`guard`); and every error is the API's JSON. Their routes that load, unload or fetch are not there.
"""

import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from w8a8.errors import EngineError, MissingExtraError, PortInUseError, first_line

try:
    import transformers
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse, StreamingResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException as StarletteHTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

    from w8a8.runtime.loading import engine_errors, load_model, quiet
    from w8a8.serve.embedded.batching import Batcher
    from w8a8.serve.embedded.guard import Guard, failure
    from w8a8.serve.embedded.protocol import ChatRequest, CompletionRequest, open_image
except ImportError as missing:
    raise MissingExtraError(
        f"the transformers engine cannot be imported ({missing}); install it: pip install 'w8a8[serve]'"
    ) from missing

DEFAULT_CONTEXT = 8192
DEFAULT_COMPLETION_TOKENS = 16
"""What the API says a completion has, unless asked for more; a chat's answer has what the context leaves."""

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

    `ready(checkpoint)` is called when requests can be answered. `max_model_len` is the context in tokens, at most
    8192 or what the model allows where it is not given. Raises PortInUseError at once; EngineError, or what is wrong
    with the checkpoint, when it cannot be loaded. A signal is raised again after everything was stopped.
    """
    with _bound(host, port) as listener:
        server = _load(checkpoint, folder, api_key, lambda: ready(checkpoint), max_model_len)
        server.run(sockets=[listener])


@contextmanager
def running(checkpoint: str, folder: Path, *, api_key: str, max_model_len: int | None = None) -> Iterator[str]:
    """Serve the checkpoint on a thread of this process, on a free port of localhost; yields the API's base URL."""
    with _bound("127.0.0.1", 0) as listener:
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


class OneModel(ModelManager):  # type: ignore[misc]
    """transformers' model manager, of a model that is loaded for good."""

    def __init__(self, name: str, folder: Path, max_model_len: int | None) -> None:
        """Load the model. Raises EngineError, or whatever transformers raises for the processor."""
        self.name = name
        self.created = int(time.time())
        self.processor = _processor(folder)
        self.model = load_model(name, folder)
        text = self.model.config.get_text_config(decoder=True)
        limit = getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT
        self.context = min(limit, max_model_len or DEFAULT_CONTEXT)
        self.modality = self.get_model_modality(self.model, self.processor)

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The model and its processor."""
        return self.model, self.processor

    def get_gen_models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "w8a8"}
        return [{**entry, "root": self.name, "max_model_len": self.context}]

    def shutdown(self) -> None:
        """The model stays as long as the process."""


class OneBatcher(GenerationState):  # type: ignore[misc]
    """transformers' choice of how to generate: together."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self.batcher = batcher

    def get_manager(self, *_: Any, **__: Any) -> Batcher:
        """The batcher."""
        return self.batcher


class _Handler(BaseHandler):  # type: ignore[misc]
    """What both handlers do differently from transformers'."""

    model_manager: OneModel

    def _validate_request(self, body: dict[str, Any]) -> None:
        """`protocol` has done so."""

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        manager = self.model_manager
        if body.get("model", manager.name) != manager.name:
            raise HTTPException(404, f"the model {body['model']} does not exist; this server has {manager.name}")
        return manager.name, manager.model, manager.processor

    def _build_generation_config(self, body: dict[str, Any], defaults: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, defaults, use_cb=use_cb)
        for name in ("top_k", "min_p", "repetition_penalty"):
            if name in body:
                setattr(config, name, body[name])
        if config.top_k is not None and config.top_k < 1:  # vLLM's way to say: all of them
            config.top_k = None
        config.do_sample = body.get("temperature", config.temperature) != 0
        config.seed = body.get("seed")
        config.stop_strings = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop")
        if body.get("ignore_eos"):
            config.eos_token_id = None
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response: StreamingResponse = super()._streaming(*args, **kwargs)
        response.body_iterator = _until_done(response.body_iterator)
        return response


class _Completions(_Handler, CompletionHandler):  # type: ignore[misc]
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request = CompletionRequest.parse(body)
        return await super().handle_request(request.model_dump(exclude_none=True), request_id)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        config.max_new_tokens = body.get("max_tokens", DEFAULT_COMPLETION_TOKENS)
        return config


class _Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        request = ChatRequest.parse(body)
        manager = self.model_manager
        self._resolve_model(body)
        if not _has_template(manager.processor):
            raise HTTPException(400, f"{manager.name} has no chat template: use /v1/completions instead")
        if request.has_images and manager.modality is Modality.LLM:
            raise HTTPException(400, f"{manager.name} takes text only, no images")
        try:
            return await super().handle_request(request.model_dump(exclude_none=True), request_id)
        except TemplateError as error:
            raise HTTPException(400, f"the chat template refuses these messages: {error}") from error

    @staticmethod
    def get_processor_inputs_from_messages(messages: list[dict[str, Any]], modality: Modality) -> list[dict[str, Any]]:
        """transformers', with images decoded by Pillow: its own decoder needs torchvision's binaries."""
        inputs: list[dict[str, Any]] = BaseHandler.get_processor_inputs_from_messages(messages, modality)
        for message in inputs:
            for part in message["content"] if isinstance(message["content"], list) else ():
                if part["type"] == "image":
                    part["image"] = open_image(part.pop("url"))
        return inputs

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        config.max_new_tokens = body.get("max_completion_tokens", body.get("max_tokens"))
        return config


class _Server(uvicorn.Server):
    """uvicorn, saying when it listens, and ending the generations under way before it waits for their requests."""

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
    chat, completions = _Chat(manager, state), _Completions(manager, state)
    app: FastAPI = build_server(manager, chat, completions, None, None, None, state)
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(Exception, _broken)
    return app


async def _refused(_: Request, error: Any) -> JSONResponse:
    return failure(error.status_code, str(error.detail))


async def _malformed(_: Request, error: Any) -> JSONResponse:
    return failure(400, f"the body is not a JSON object, sent as application/json: {error.errors()[0]['msg']}")


async def _broken(_: Request, error: Exception) -> JSONResponse:
    return failure(500, f"{type(error).__name__} in the server; its log has more")


async def _until_done(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The events, an error among them as the API spells it, and the one that the API ends with."""
    async for event in events:
        before, error, message = event.rpartition('data: {"error": "')
        if error:
            body = failure(503, message.rpartition('"}')[0]).body
            yield f"{before}data: {bytes(body).decode()}\n\n"
        else:
            yield event
    yield "data: [DONE]\n\n"


def _processor(folder: Path) -> Any:
    """The processor, or, where it cannot be had (no torchvision), the tokenizer: text is answered all the same."""
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        logging.getLogger("uvicorn.error").warning("no images: the processor cannot be loaded (%s)", first_line(error))
        return transformers.AutoTokenizer.from_pretrained(folder)


def _has_template(processor: Any) -> bool:
    tokenizer = getattr(processor, "tokenizer", processor)
    return bool(getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None))


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound before minutes of loading; it does not listen yet, so that nobody waits for an answer."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise PortInUseError(f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port") from error
    with listener:
        yield listener


def _log_config() -> dict[str, Any]:
    """uvicorn's, all of it to standard error: a line per request, no chatter about starting and stopping."""
    config: dict[str, Any] = json.loads(json.dumps(uvicorn.config.LOGGING_CONFIG))
    config["handlers"]["access"]["stream"] = "ext://sys.stderr"
    config["loggers"]["uvicorn.error"]["level"] = "WARNING"
    config["loggers"]["w8a8"] = {"handlers": ["default"], "level": "WARNING"}
    return config
