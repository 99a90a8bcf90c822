"""transformers' model manager and request handlers, made to serve one model whose requests are decoded together.

The classes they are made from (`transformers.cli.serving`) are private to transformers: see `TRANSFORMERS`.
"""

import logging
import time
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import transformers
from fastapi import HTTPException
from fastapi.responses import StreamingResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerationState, Modality

from w8a8.errors import first_line
from w8a8.runtime.loading import load_model
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.protocol import ChatRequest, CompletionRequest, failure, open_image

DEFAULT_CONTEXT = 8192
DEFAULT_COMPLETION_TOKENS = 16
"""The API's limit of a completion that asks for none; a chat's answer may fill the context."""


class OneModel(ModelManager):  # type: ignore[misc]
    """transformers' model manager, for one model that is loaded for good."""

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
        """Return the model and its processor."""
        return self.model, self.processor

    def get_gen_models(self) -> list[dict[str, Any]]:
        """List the model, for `/v1/models`."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "w8a8"}
        return [{**entry, "root": self.name, "max_model_len": self.context}]

    def shutdown(self) -> None:
        """Keep the model: it stays as long as the process."""


class OneBatcher(GenerationState):  # type: ignore[misc]
    """transformers' choice of how to generate: always by the batcher."""

    def __init__(self, batcher: Batcher) -> None:
        super().__init__()
        self.batcher = batcher

    def get_manager(self, *_: Any, **__: Any) -> Batcher:
        """Return the batcher."""
        return self.batcher


class _Handler(BaseHandler):  # type: ignore[misc]
    """The differences from transformers' handlers that both endpoints share."""

    model_manager: OneModel

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Check nothing: `protocol` has checked the request."""

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


class Completions(_Handler, CompletionHandler):  # type: ignore[misc]
    """`POST /v1/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises HTTPException 4xx for one that cannot be answered."""
        request = CompletionRequest.parse(body)
        return await super().handle_request(request.model_dump(exclude_none=True), request_id)

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)
        config.max_new_tokens = body.get("max_tokens", DEFAULT_COMPLETION_TOKENS)
        return config


class Chat(_Handler, ChatCompletionHandler):  # type: ignore[misc]
    """`POST /v1/chat/completions`."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request. Raises HTTPException 4xx for one that cannot be answered."""
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
        """Do as transformers does, but decode images by Pillow: its own decoder needs torchvision's binaries."""
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


async def _until_done(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """Pass the events on, an error among them as the API spells it, and add the event that the API ends with."""
    async for event in events:
        before, error, message = event.rpartition('data: {"error": "')
        if error:
            body = failure(503, message.rpartition('"}')[0]).body
            yield f"{before}data: {bytes(body).decode()}\n\n"
        else:
            yield event
    yield "data: [DONE]\n\n"


def _processor(folder: Path) -> Any:
    """Load the processor or, where it cannot be had (no torchvision), the tokenizer, which still answers text."""
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        log = logging.getLogger("uvicorn.error")
        log.warning("no images: the processor cannot be loaded (%s)", first_line(error))
        return transformers.AutoTokenizer.from_pretrained(folder)


def _has_template(processor: Any) -> bool:
    tokenizer = getattr(processor, "tokenizer", processor)
    return bool(getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None))
