"""One request on its way through the embedded engine: its tokens, its text, and the strings that end it.

A whole answer is what a streamed one adds up to: both are made of the same items, in the same order.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeAlias

import torch
from fastapi import HTTPException
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import GenerationConfig
from transformers.cli.serving.utils import response_events_to_chunks

from w8a8.errors import first_line
from w8a8.serve.embedded.sampling import likeliest, sample
from w8a8.serve.embedded.scoring import Scored, score

Item: TypeAlias = Any
"""A piece of an answer: a `str` of text, a `ReasoningText` (a str, too), or a `ToolCall` that the model asks for."""

MAX_WAIT_SECONDS = 600.0
"""The time that a request waits for its turn."""

LATER = {"Retry-After": "10"}
"""The header of an answer to a request that may be sent again, after so many seconds."""

UNPARSED = (ValueError, RuntimeError, LookupError, TypeError, TimeoutError)
"""What parsing an answer raises where it is not as the response template has it, or takes too long."""

_log = logging.getLogger(__name__)


class Stream:
    """One request: its settings, its tokens so far, and the items of its answer on their way to the event loop."""

    def __init__(
        self,
        inputs: dict[str, Tensor],
        config: GenerationConfig,
        tokenizer: Any,
        processors: Callable[[Tensor, Tensor], Tensor] | None = None,
        parser: Any = None,
    ) -> None:
        """Take the `inputs` as the processor returned them for one sequence: `input_ids` [1, prompt], perhaps images.

        `tokenizer` is that of the `tokenizers` library. `processors` turn `input_ids` [1, n] and `scores`
        [1, vocabulary] into scores, as in `model.generate`, before a token is sampled. `parser`, transformers'
        `ResponseParser`, finds reasoning and calls in the text. Made on the event loop that `items` is read on.

        Each token of the answer, and with `config.echo` of the prompt, is scored, beside the `config.logprobs`
        likeliest; None: nothing is.
        """
        self.inputs = inputs
        self.prompt: list[int] = inputs["input_ids"][0].tolist()
        self.tokens: list[int] = []
        self.done = False
        self.config = config
        self.likeliest: int | None = getattr(config, "logprobs", None)
        self.echo = bool(getattr(config, "echo", False))
        self.scores: list[Scored] = []
        self.begins: list[int] = []  # where each token of the answer begins in its text
        self._characters = 0
        self.finish_reason: Literal["stop", "length"] = "stop"
        self._loop = asyncio.get_running_loop()
        self.told = 0  # the scores that belong to the items read so far
        self._queue: asyncio.Queue[tuple[Item | _Failure | None, int]] = asyncio.Queue()
        self._begun = asyncio.Event()
        self._cancelled = threading.Event()
        self.tokenizer = tokenizer
        self._parser, self._processors = parser, processors
        self._decoder = DecodeStream([], skip_special_tokens=parser is None)
        self._unread = ""
        self._generator = None
        if (seed := getattr(config, "seed", None)) is not None:
            self._generator = torch.Generator(inputs["input_ids"].device).manual_seed(seed)
        eos = config.eos_token_id
        self._eos = set(eos) if isinstance(eos, list) else {eos}
        self._stop = StopStrings(config.stop_strings or ())
        if parser is not None:
            self._send(response_events_to_chunks(parser.initial_events))

    # --- on the event loop ----------------------------------------------------------------------------------------

    async def turn(self) -> None:
        """Wait until the engine begins with this request. Raises HTTPException 503 if that takes too long."""
        try:
            async with asyncio.timeout(MAX_WAIT_SECONDS):
                await self._begun.wait()
        except TimeoutError:
            waited = f"the request has waited {MAX_WAIT_SECONDS:.0f} s for its turn; try again later"
            raise HTTPException(503, waited, LATER) from None
        finally:
            if not self._begun.is_set():
                self.cancel()

    async def items(self) -> AsyncIterator[Item]:
        """Yield the answer piece by piece. Raises HTTPException 503 if the engine fails; cancels what nobody reads."""
        try:
            while True:
                item, self.told = await self._queue.get()
                if item is None:
                    return
                if isinstance(item, _Failure):
                    raise HTTPException(503, item.message)
                yield item
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Say that nobody waits for the rest."""
        self._cancelled.set()

    # --- on the engine's thread -----------------------------------------------------------------------------------

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + int(self.config.max_new_tokens)

    @property
    def cancelled(self) -> bool:
        """Whether the client is gone."""
        return self._cancelled.is_set()

    def begin(self) -> None:
        """Say that this request's turn has come."""
        self._call(self._begun.set)

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt are asked for."""
        return self.echo and self.likeliest is not None

    def read(self, logits: Tensor, begin: int) -> None:
        """Score the prompt's tokens behind position `begin` by the logits [positions, vocabulary] from there on."""
        following = self.prompt[begin + 1 : begin + 1 + len(logits)]
        self.scores += score(logits[: len(following)], following, self.likeliest or 0)

    def choose(self, logits: Tensor) -> None:
        """Choose the next token by logits [vocabulary] of any float dtype, and take it; an error ends this stream.

        Where the answer is to have no token, the stream ends.
        """
        if not self.config.max_new_tokens:
            self.finish_reason = "length"
            self._end()
            return
        try:
            scores = logits.float()
            if self._processors is not None:
                read = torch.tensor([self.prompt + self.tokens], device=scores.device)
                scores = self._processors(read, scores[None])[0]
            drawn = self.config.do_sample
            self.take(sample(scores, self.config, self._generator) if drawn else likeliest(scores), logits)
        except Exception as error:  # noqa: BLE001 - one request's, not the batch's
            _log.exception("a request failed")
            self.fail(one_line(error))

    def take(self, token: int, logits: Tensor | None = None) -> None:
        """Add a token, chosen by logits [vocabulary], pass its text on, and end the sequence if it is the last."""
        self.tokens.append(token)
        self.begins.append(self._characters)
        if self.likeliest is not None and logits is not None:
            self.scores += score(logits[None], [token], self.likeliest)
        text = self._decoder.step(self.tokenizer, token) or ""
        self._characters += len(text)
        self._say(self._stop.feed(text))
        if token in self._eos or self._stop.found:
            self._end()
        elif len(self.tokens) >= self.config.max_new_tokens:
            self.finish_reason = "length"
            self._end()

    def fail(self, message: str) -> None:
        """Close the stream with an error."""
        self.done = True
        self._send([_Failure(message)])
        self.begin()

    def _end(self) -> None:
        """Pass the rest of the text on, and close the stream."""
        self.done = True
        self._say(self._stop.rest())
        if self._parser is not None:
            with suppress(*UNPARSED):  # cut off in the middle of a call
                self._send(response_events_to_chunks(self._parser.finalize()[1]))
        self._send([None])

    def _say(self, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            self._send([text])
            return
        self._unread += text
        try:
            items = response_events_to_chunks(self._parser.feed(text))
        except UNPARSED:  # no call after all: it is text, like all that follows
            self._parser, items = None, [self._unread]
        if items:
            self._unread = ""
        self._send(items)

    def _send(self, items: Sequence["Item | _Failure | None"]) -> None:
        for item in items:
            self._call(self._queue.put_nowait, (item, len(self.scores)))

    def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call a function on the event loop."""
        with suppress(RuntimeError):  # that has ended, and nobody listens
            self._loop.call_soon_threadsafe(function, *arguments)


class _Failure:
    """The end of a stream that failed."""

    def __init__(self, message: str) -> None:
        self.message = message


class StopStrings:
    """Pass text through up to the first stop string, holding back an end that may be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        """Stop at any of `strings`, none of them empty."""
        self.strings = strings
        self.found = False
        self._held = ""

    def feed(self, text: str) -> str:
        """Add a piece of text; return the part of the text that is safe to show now."""
        text = self._held + text
        places = [place for place in map(text.find, self.strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        longest = max(map(len, self.strings), default=1) - 1
        kept = next((n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Return the text held back, once no more comes."""
        rest, self._held = self._held, ""
        return rest

    def _may_begin(self, tail: str) -> bool:
        return any(string.startswith(tail) for string in self.strings)


def one_line(error: Exception) -> str:
    """Put an error into one line."""
    return f"{type(error).__name__}: {first_line(error)}"
