"""The states between two decoder layers, for all samples, in a file.

The quantized layers before produce them. A file holds one sample after the other, float32 [samples, tokens, hidden].
Samples are read and written one at a time and so take the memory of one; the page cache keeps as much of the file in
RAM as fits.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w8a8.reading import open_file, reading
from w8a8.recipes.layer import Batch
from w8a8.storage.writer import SequentialWriter

HELD_OUT_EVERY = 8
"""One of this many samples is held out, to judge candidates by."""


def held_out(samples: int) -> Sequence[bool]:
    """Which of `samples` (at least 2) are held out: every 8th, or the last of fewer than 8."""
    every = min(HELD_OUT_EVERY, samples)
    return [number % every == every - 1 for number in range(samples)]


def spread(samples: int, count: int, *, apart: bool) -> Sequence[int]:
    """The numbers of at least one and at most `count` samples, evenly spread over those held out (`apart`) or not."""
    numbers = [number for number, each in enumerate(held_out(samples)) if each is apart]
    count = min(len(numbers), max(1, count))
    return [numbers[len(numbers) * i // count] for i in range(count)]


@dataclass(frozen=True, slots=True)
class Activations:
    """The states that enter a layer: a file of `samples` times [tokens, hidden] float32."""

    path: Path
    samples: int
    tokens: int
    hidden: int

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.samples * self.tokens * self.hidden * 4

    def write(self, states: Iterable[Tensor]) -> None:
        """Write the states [1, tokens, hidden] of every sample, and sync the file.

        Raises `DiskFullError` or `UnwritableError`.
        """
        with SequentialWriter(self.path) as writer:
            for each in states:
                writer.append(memoryview(each.cpu().contiguous().numpy().reshape(-1).view(np.uint8)))
            writer.finish()

    def states(self, device: torch.device) -> Iterator[Tensor]:
        """Read the states [1, tokens, hidden] of every sample onto `device`."""
        with reading(self.path), open_file(self.path) as file:
            for _ in range(self.samples):
                values = torch.from_numpy(np.fromfile(file, np.float32, self.tokens * self.hidden))
                yield values.reshape(1, self.tokens, -1).to(device)


@dataclass(frozen=True, slots=True)
class Batches:
    """The samples of a file, one per batch, for a layer whose other arguments are `kwargs`; can be read repeatedly.

    `token_costs` has the costs of errors by token for some samples, by their numbers.
    """

    activations: Activations
    kwargs: Mapping[str, Any]
    token_costs: Mapping[int, Mapping[str, Tensor]]
    device: torch.device

    def __iter__(self) -> Iterator[Batch]:
        apart = held_out(self.activations.samples)
        for number, states in enumerate(self.activations.states(self.device)):
            yield Batch(states, self.kwargs, apart[number], self.token_costs.get(number))
