"""One request on its way through the embedded engine: its tokens, its text, and the strings that end it."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cli.serving.utils import DirectStreamer, _StreamError, response_events_to_chunks

from w8a8.errors import first_line


class Stream(DirectStreamer):  # type: ignore[misc]
    """One request: its settings, its tokens so far, and its text on the way to the handler's queue.

    transformers' streamer decodes the tokens; this class cuts off the stop strings.
    """

    def __init__(
        self,
        inputs: dict[str, Tensor],
        config: GenerationConfig,
        processors: Callable[[Tensor, Tensor], Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take the `inputs` as the processor returned them for one sequence: `input_ids` [1, prompt], perhaps images.

        `processors` turn `input_ids` [1, n] and `scores` [1, vocabulary] into scores, as in `model.generate`.
        """
        super().__init__(*args, **kwargs)
        self.inputs = inputs
        self.prompt: list[int] = inputs["input_ids"][0].tolist()
        self.tokens: list[int] = []
        self.done = False
        self.config = config
        self._processors = processors
        self._generator = None
        if (seed := getattr(config, "seed", None)) is not None:
            self._generator = torch.Generator(inputs["input_ids"].device).manual_seed(seed)
        eos = config.eos_token_id
        self._eos = set(eos) if isinstance(eos, list) else {eos}
        self._stop = StopStrings(config.stop_strings or ())
        self._first = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def cancelled(self) -> bool:
        """Whether the client is gone."""
        return bool(self._cancelled.is_set())

    def choose(self, logits: Tensor) -> None:
        """Choose the next token by logits [vocabulary] of any float dtype, and take it."""
        scores = logits.float()[None]
        if self._processors is not None:
            scores = self._processors(torch.tensor([self.prompt + self.tokens], device=scores.device), scores)
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            token = scores.argmax(-1)
        self.take(int(token))

    def take(self, token: int) -> None:
        """Add a token, pass its text on, and end the sequence if it is the last."""
        self.tokens.append(token)
        self.total_tokens += 1
        self._emit(self._stop.feed(self._decode_stream.step(self._tokenizer, token) or ""))
        if token in self._eos or self._stop.found:
            self.config.max_new_tokens = None  # tells the handler that length was not the reason to stop
            self.end()
        elif self.total_tokens >= self.config.max_new_tokens:
            self.end()

    def end(self) -> None:
        """Pass the rest of the text on, and close the stream."""
        self.done = True
        self._emit(self._stop.rest())
        super().end()

    def fail(self, message: str) -> None:
        """Close the stream with an error."""
        self.done = True
        self._enqueue(_StreamError(message))

    def cut(self, text: str) -> str:
        """Return `text` up to the stop string that ended the sequence, if one did."""
        return StopStrings(self._stop.strings).feed(text) if self._stop.found else text

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the sequence."""
        return self._stop.found

    def _enqueue(self, item: Any) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and nobody listens
            super()._enqueue(item)

    def _emit(self, text: str) -> None:
        if text:
            items = [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text))
            for item in items:
                self._enqueue(item)


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
    """Put an error into one line that needs no escaping in a JSON string: transformers' handlers do none."""
    return f"{type(error).__name__}: {first_line(error)}".replace("\\", "/").replace('"', "'")
