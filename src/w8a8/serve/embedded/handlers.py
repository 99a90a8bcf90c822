"""The endpoints of the embedded engine."""

import asyncio
import copy
import uuid
from typing import Any, TypeVar

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request as Call
from starlette.responses import Response
from starlette.routing import Route

from w8a8.serve.embedded.answers import Chat, Completion, Spelling
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.model import OneModel
from w8a8.serve.embedded.prompts import Prompt, Prompts
from w8a8.serve.embedded.protocol import ChatRequest, CompletionRequest, Request, read

DEFAULT_COMPLETION_TOKENS = 16
"""The API's limit of a completion that asks for none; a chat's answer may fill the context."""

_R = TypeVar("_R", bound=Request)


class Api:
    """The endpoints, for one model."""

    def __init__(self, model: OneModel, batcher: Batcher, prompts: Prompts) -> None:
        self._model, self._batcher, self._prompts = model, batcher, prompts

    @property
    def routes(self) -> list[Route]:
        """The paths, with the function for each."""
        return [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def health(self, _: Call) -> Response:
        """Say that the server answers, and what its cache holds."""
        return JSONResponse({"status": "ok", "cache": self._batcher.memory})

    async def models(self, _: Call) -> Response:
        """List the model."""
        return JSONResponse({"object": "list", "data": [self._model.entry]})

    async def one_model(self, call: Call) -> Response:
        """Describe the model of a name."""
        self._check_name(call.path_params["name"])
        return JSONResponse(self._model.entry)

    async def completions(self, call: Call) -> Response:
        """Complete a text. Raises HTTPException 4xx for a request that cannot be answered."""
        asked = await self._asked(call, CompletionRequest)
        prompt = await self._prompts.of_completion(asked)
        limit = DEFAULT_COMPLETION_TOKENS if asked.limit is None else asked.limit
        name = f"cmpl-{uuid.uuid4().hex}"
        spelling = Completion(name, self._model.name, text=prompt.text, begins=prompt.begins)
        return await self._answer(asked, prompt, limit, spelling)

    async def chat(self, call: Call) -> Response:
        """Answer messages. Raises HTTPException 4xx for a request that cannot be answered."""
        asked = await self._asked(call, ChatRequest)
        prompt = await self._prompts.of_chat(asked)
        return await self._answer(asked, prompt, asked.limit, Chat(f"chatcmpl-{uuid.uuid4().hex}", self._model.name))

    async def _asked(self, call: Call, kind: type[_R]) -> _R:
        if call.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Any page in a browser may send other types, to this machine too, without asking first.
            raise HTTPException(400, "the body must be sent as application/json")
        body = await call.body()
        asked: _R = await asyncio.to_thread(lambda: kind.parse(read(body)))
        if asked.model is not None:
            self._check_name(asked.model)
        return asked

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            raise HTTPException(404, f"the model {name} does not exist; this server has {self._model.name}")

    async def _answer(self, asked: Request, prompt: Prompt, limit: int | None, spelling: Spelling) -> Response:
        config = generation_config(asked, self._model.model.generation_config, limit)
        stream = self._batcher.submit(prompt.inputs, config, self._model.tokenizer, prompt.parser)
        await stream.turn()
        if asked.stream:
            return StreamingResponse(spelling.events(stream, asked.with_usage), media_type="text/event-stream")
        return JSONResponse(spelling.whole([item async for item in stream.items()], stream))


def generation_config(asked: Request, defaults: Any, limit: int | None) -> Any:
    """The settings of a request on top of the model's own; `seed`, `echo`, `logprobs` are not transformers' fields."""
    config = copy.deepcopy(defaults)
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if (value := getattr(asked, name)) is not None:
            setattr(config, name, value)
    if config.top_k is not None and config.top_k < 1:  # vLLM's way to say: all of them
        config.top_k = None
    config.do_sample = config.temperature != 0
    config.seed = asked.seed
    config.echo, config.logprobs = isinstance(asked, CompletionRequest) and asked.echo, asked.likeliest
    config.stop_strings = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    config.max_new_tokens = limit
    if asked.ignore_eos:
        config.eos_token_id = None
    return config
