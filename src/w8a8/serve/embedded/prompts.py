"""A request's messages or text as the inputs of the model, made beside the event loop and within bounds.

What may take for ever, a chat template or an image, goes to a process of its own (`rendering`), for which one thread
waits. Another does the rest: it tokenizes what was tokenized in time by another process (`rehearsing`). Requests with
images follow each other, so that their memory is that of one.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from fastapi import HTTPException
from PIL.Image import Image
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers.cli.serving.utils import get_response_template
from transformers.utils.chat_parsing import ResponseParser

from w8a8.errors import first_line
from w8a8.serve.embedded.batching import SHUTTING_DOWN
from w8a8.serve.embedded.images import check
from w8a8.serve.embedded.patterns import response_parser
from w8a8.serve.embedded.protocol import ChatRequest, CompletionRequest
from w8a8.serve.embedded.rehearsing import Rehearsal
from w8a8.serve.embedded.rendering import Renderer
from w8a8.serve.embedded.worker import RefusedError

CHARACTERS_PER_TOKEN = 64
"""The longest prompt, for each token of the context; in text a token has 4 characters, and a run of spaces 31."""

_R = TypeVar("_R")


@dataclass(frozen=True, slots=True)
class Prompt:
    """The model's inputs, `input_ids` [1, tokens] among them, and a parser for the answer (None: it is text alone).

    Of a prompt to echo, `text` is its text, in which each token begins at the character in `begins`.
    """

    inputs: dict[str, Tensor]
    parser: ResponseParser | None = None
    text: str = ""
    begins: tuple[int, ...] = ()


class Prompts:
    """Makes the prompts of one model."""

    def __init__(self, name: str, model: Any, processor: Any, *, context: int, sees: bool) -> None:
        """Serve `model` with its `processor`, which is a tokenizer where the model is not one that `sees` images."""
        self._name, self._model, self._processor, self._sees = name, model, processor, sees
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._limit = CHARACTERS_PER_TOKEN * context
        self._renderer, self._rehearsal = Renderer(), Rehearsal(self._tokenizer._tokenizer)
        self._seeing = asyncio.Lock()
        self._rendering, self._reading = ThreadPoolExecutor(1, "w8a8-templates"), ThreadPoolExecutor(1, "w8a8-prompts")

    def close(self) -> None:
        """End what is being made, and make no more."""
        self._renderer.close()
        self._rehearsal.close()
        for thread in (self._rendering, self._reading):
            thread.shutdown(wait=False, cancel_futures=True)

    async def of_chat(self, request: ChatRequest) -> Prompt:
        """Make the prompt of a chat. Raises HTTPException 400 if template or model refuses it, 503 at the end."""
        text = await _on(self._rendering, lambda: self._render(request))
        if not self._sees:
            return await _on(self._reading, lambda: self._parsed(request, self._tokens(text, special=False)))
        async with self._seeing:
            images = await _on(self._rendering, lambda: self._decode(request.images))
            return await _on(self._reading, lambda: self._parsed(request, self._see(text, images)))

    async def of_completion(self, request: CompletionRequest) -> Prompt:
        """Make the prompt of a text, or of tokens. Raises HTTPException 400 if it is too long or has unknown tokens."""
        return await _on(self._reading, lambda: self._completed(request.prompt, echo=bool(request.echo)))

    def _completed(self, prompt: str | list[int], *, echo: bool) -> Prompt:
        if isinstance(prompt, str):
            inputs = self._tokens(prompt, special=True, return_offsets_mapping=echo)
            spans = inputs.pop("offset_mapping")[0].tolist() if echo else []
            return Prompt(inputs, text=prompt if echo else "", begins=_begins(spans))
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        if (highest := max(prompt, default=0)) >= vocabulary:
            raise HTTPException(400, f"prompt: the model has {vocabulary:,} tokens, and none with the number {highest}")
        inputs = {"input_ids": torch.tensor([prompt], dtype=torch.long, device=self._model.device)}
        if not echo:
            return Prompt(inputs)
        decoder, core = DecodeStream([], skip_special_tokens=False), self._tokenizer._tokenizer
        pieces = [decoder.step(core, token) or "" for token in prompt]
        return Prompt(inputs, text="".join(pieces), begins=tuple(accumulate(map(len, pieces[:-1]), initial=0)))

    def _render(self, request: ChatRequest) -> str:
        template = self._template(request)
        if request.images and not self._sees:
            raise HTTPException(400, f"{self._name} takes text only, no images")
        try:
            return self._renderer.render(
                template,
                [message.for_template(sees=self._sees) for message in request.messages],
                tools=request.offered,
                special=self._tokenizer.special_tokens_map,
                given=request.chat_template_kwargs,
                offered={"reasoning_effort": request.reasoning_effort} if request.reasoning_effort is not None else {},
                limit=self._limit,
            )
        except RefusedError as error:
            if self._renderer.closed:
                raise HTTPException(503, SHUTTING_DOWN) from error
            raise HTTPException(400, f"the chat template refuses these messages: {error}") from error

    def _decode(self, urls: list[str]) -> list[Image]:
        try:
            check(urls)
            return self._renderer.decode(urls)
        except (ValueError, RefusedError) as error:
            if self._renderer.closed:
                raise HTTPException(503, SHUTTING_DOWN) from error
            raise HTTPException(400, f"messages: the images cannot be taken: {error}") from error

    def _template(self, request: ChatRequest) -> str:
        """Find the template, that for tools if there is one and the request has some."""
        found = getattr(self._processor, "chat_template", None) or getattr(self._tokenizer, "chat_template", None)
        if isinstance(found, dict):
            found = (found.get("tool_use") if request.offered else None) or found.get("default")
        if not isinstance(found, str) or not found:
            raise HTTPException(400, f"{self._name} has no chat template: use /v1/completions instead")
        return found

    def _tokens(self, text: str, *, special: bool, **more: Any) -> dict[str, Tensor]:
        if len(text) > self._limit:
            raise HTTPException(
                400, f"the prompt has {len(text):,} characters, and at most {self._limit:,} can fit the context"
            )
        return self._ready(text, lambda: self._tokenizer(text, add_special_tokens=special, return_tensors="pt", **more))

    def _see(self, text: str, images: list[Image]) -> dict[str, Tensor]:
        """Let the processor read the text and the images, as its `apply_chat_template` does."""
        begun = bool(self._tokenizer.bos_token) and text.startswith(self._tokenizer.bos_token)
        special = {"add_special_tokens": False} if begun else {}
        return self._ready(
            text,
            lambda: self._processor(text=text, images=[images] if images else None, return_tensors="pt", **special),
        )

    def _ready(self, text: str, read: Callable[[], Any]) -> dict[str, Tensor]:
        try:
            self._rehearsal.tokenize(text)
            inputs = read()
        except RefusedError as error:
            if self._rehearsal.closed:
                raise HTTPException(503, SHUTTING_DOWN) from error
            raise HTTPException(400, f"the model's tokenizer cannot read the prompt: {error}") from error
        except Exception as error:  # the text, or the images, of the request
            raise HTTPException(400, f"the model's processor refuses the prompt: {first_line(error)}") from error
        return dict(inputs.to(self._model.device))

    def _parsed(self, request: ChatRequest, inputs: dict[str, Tensor]) -> Prompt:
        template = get_response_template(self._processor, self._model)
        if template is None:
            return Prompt(inputs)
        prefix = self._tokenizer.decode(inputs["input_ids"][0])
        try:
            return Prompt(inputs, response_parser(template, prefix, request.offered))
        except TimeoutError as error:
            raise HTTPException(400, f"the model's response template cannot read the prompt: {error}") from error


def _begins(spans: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Find where each token begins: where the one before it ends, or with that, where both are parts of a character.

    Some tokenizers leave the space before a word out of its span, and special tokens have none.
    """
    begins, end = [0], 0
    for start, stop in spans:
        begins.append(max(begins[-1], min(start, end) if start < stop else end))
        end = max(end, stop)
    return tuple(begins[1:])


async def _on(thread: ThreadPoolExecutor, function: Callable[[], _R]) -> _R:
    """Call `function` on a thread. Raises HTTPException 503 when that is closed."""
    try:
        call = asyncio.get_running_loop().run_in_executor(thread, function)
    except RuntimeError as error:
        raise HTTPException(503, SHUTTING_DOWN) from error
    return await call
