"""Beginnings of prompts that were read before: examples, a system message, a conversation so far.

Where a prompt parts from one before it, the keys and values up to there are kept, and a later prompt that begins alike
is read from there on. They are copied, so that no sequence depends on another.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import DynamicCache

from w8a8.serve.embedded.admitted import Admitted
from w8a8.serve.embedded.caches import Caches

LEAST = 64
"""Tokens that a beginning has beyond another that is kept; fewer are read as quickly as copied."""

MOST = 16
"""Beginnings that are kept, the latest used; and prompts that a new one is compared with."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A beginning of prompts: its tokens, and the cache of a sequence that has read them."""

    tokens: Sequence[int]
    cache: DynamicCache
    nbytes: int

    def begins(self, prompt: Sequence[int]) -> bool:
        """Say whether `prompt` begins so, and goes on."""
        return len(prompt) > len(self.tokens) and prompt[: len(self.tokens)] == self.tokens


class Prefixes:
    """The beginnings that are kept."""

    def __init__(self, caches: Caches) -> None:
        """Keep those of the sequences of `caches`."""
        self._caches = caches
        self._kept: deque[Prefix] = deque(maxlen=MOST)  # the latest used is the last
        self._prompts: deque[Sequence[int]] = deque(maxlen=MOST)

    def begin(self, sequence: Admitted) -> None:
        """Let a sequence begin with what is kept of its prompt, and pause where that parts from others."""
        prompt = sequence.stream.prompt
        if not (self._caches.join and sequence.is_text) or sequence.stream.scores_prompt:
            return
        known = max(
            (each for each in self._kept if each.begins(prompt)), key=lambda each: len(each.tokens), default=None
        )
        if known:
            self._caches.copy(known.cache, sequence.cache)
            sequence.read = len(known.tokens)
            self._use(known)
        least = sequence.read + LEAST
        alike = (other for other in self._prompts if other[:least] == prompt[:least])
        shared = max((_shared(prompt, other) for other in alike), default=0)
        if shared >= least:
            sequence.pause = shared
        self._prompts.append(prompt)

    def keep(self, sequence: Admitted, room: int | None) -> None:
        """Keep what a sequence has read, if it fits into `room` bytes (None: any number) with others or without."""
        tokens = sequence.stream.prompt[: sequence.read]
        nbytes = self._caches.nbytes(len(tokens))
        if self.shrink(None if room is None else room - nbytes):
            cache = self._caches.of_one(len(tokens))
            self._caches.copy(sequence.cache, cache)
            self._use(Prefix(tokens, cache, nbytes))

    def shrink(self, room: int | None) -> bool:
        """Drop what was not used for longest until the rest fits into `room` bytes; say whether it does."""
        if room is None:
            return True
        if room < 0:
            return False
        while sum(each.nbytes for each in self._kept) > room:
            self._kept.popleft()
        return True

    def _use(self, prefix: Prefix) -> None:
        others = [each for each in self._kept if each.tokens != prefix.tokens]
        self._kept = deque([*others, prefix], maxlen=MOST)


def _shared(prompt: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens with which both begin; the last of `prompt` is always to be read."""
    pairs = zip(prompt[:-1], other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
