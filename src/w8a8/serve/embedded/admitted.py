"""A request that the engine has begun with, its cache, and pieces of it that a forward pass reads."""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w8a8.runtime.sliced import sliced_logits
from w8a8.serve.embedded.caches import Caches
from w8a8.serve.embedded.scoring import positions
from w8a8.serve.embedded.stream import Stream

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""The inputs a processor returns for a prompt without images; for one sequence alone only the first tells anything."""


class Admitted:
    """A request that has been admitted, and its cache, in which are the `read` first tokens of its prompt.

    `alone`: whether its prompt is read by itself. `pause`: how many tokens are read before a turn ends.
    """

    def __init__(self, stream: Stream, caches: Caches, *, alone: bool = False) -> None:
        """Begin with a request.

        One with images, one whose prompt is scored, or of a model whose sequences do not fit into one row, is `alone`.
        """
        self.stream = stream
        self.cache, self.nbytes = caches.of_one(stream.longest), caches.nbytes(stream.longest)
        self.is_text = stream.inputs.keys() <= TEXT_INPUTS
        self.alone = alone or stream.scores_prompt or not (self.is_text and caches.apart)
        self.read = self.pause = 0

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not read yet."""
        return len(self.stream.prompt) - self.read

    @property
    def ended(self) -> bool:
        """Whether no more is to be done."""
        return self.stream.done or self.stream.cancelled

    def next(self, most: int) -> int:
        """Return how many tokens to read next: `most`, if so many come before the end or a pause; all with images."""
        end = self.pause if self.pause > self.read else len(self.stream.prompt)
        return min(end - self.read, most) if self.is_text else self.unread


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of a sequence's prompt, at the positions from `begin` to `end`."""

    sequence: Admitted
    begin: int
    end: int

    @property
    def tokens(self) -> list[int]:
        """Return the tokens."""
        return self.sequence.stream.prompt[self.begin : self.end]

    def logits(self, model: Any) -> Tensor:
        """Read it by itself; return the logits [vocabulary] of its last token."""
        inputs, cache = self.sequence.stream.inputs, {"past_key_values": self.sequence.cache, "use_cache": True}
        if self.sequence.is_text:
            places = torch.arange(self.begin, self.end, device=model.device)[None]
            inputs = {"input_ids": torch.tensor([self.tokens], device=model.device), "position_ids": places}
        else:
            inputs = model.prepare_inputs_for_generation(is_first_iteration=True, **cache, **inputs)
        if self.sequence.stream.scores_prompt:
            return read_scored(model, self.sequence.stream, self.begin, **{**inputs, **cache})
        logits: Tensor = model(**{**inputs, **cache, "logits_to_keep": 1}).logits[0, -1]
        return logits


def read_scored(model: Any, stream: Stream, begin: int, **inputs: Any) -> Tensor:
    """Read tokens of a prompt from position `begin` on, and score what follows them; return the last logits."""
    logits = torch.empty(0)
    with closing(sliced_logits(model, positions(model), **inputs)) as slices:
        for logits in slices:
            stream.read(logits, begin)
            begin += len(logits)
    return logits[-1]
