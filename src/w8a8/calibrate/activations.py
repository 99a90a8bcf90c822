"""What flows between two decoder layers: the states of every sample, twice, in a file.

`hidden` is what the layers before give once they are quantized, `reference` what they give as they were. A file holds
both for every sample, one sample behind the other, float32 [samples, 2, tokens, hidden]. Samples are read and written
one at a time, so that they take as much memory as one of them, and the page cache keeps as much of the file in RAM as
there is room for.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from w8a8.checkpoint import reading
from w8a8.execute.writer import SequentialWriter

HELD_OUT_EVERY = 8
"""Every so manieth sample is kept from choosing, to judge by."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples on their way into a layer, all of the same length.

    `hidden` and `reference` float32 [samples, tokens, hidden]: as the quantized layers before produce it, and as the
    unquantized model does. `kwargs` is what the layer's `forward` takes besides. `held_out` samples judge, and must
    not be used to choose.
    """

    hidden: Tensor
    reference: Tensor
    kwargs: Mapping[str, Any]
    held_out: bool


def held_out(samples: int) -> Sequence[bool]:
    """Which of `samples` (at least 2) are held out: every 8th, or the last where there are fewer."""
    every = min(HELD_OUT_EVERY, samples)
    return [number % every == every - 1 for number in range(samples)]


@dataclass(frozen=True, slots=True)
class Activations:
    """The states that enter a layer: a file of `samples` times [2, tokens, hidden] float32."""

    path: Path
    samples: int
    tokens: int
    hidden: int

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self.samples * 2 * self.tokens * self.hidden * 4

    def write(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Write `(hidden, reference)`, each [1, tokens, hidden], of every sample, and sync the file.

        Raises `DiskFullError` or `UnwritableError`.
        """
        with SequentialWriter(self.path) as writer:
            for pair in pairs:
                for states in pair:
                    writer.append(memoryview(states.cpu().contiguous().numpy().reshape(-1).view(np.uint8)))
            writer.finish()

    def batches(self, kwargs: Mapping[str, Any], device: torch.device) -> "Batches":
        """All samples, for a layer that takes `kwargs` besides, on `device`."""
        return Batches(self, kwargs, device)


@dataclass(frozen=True, slots=True)
class Batches:
    """The samples of a file, one a batch; can be gone through any number of times."""

    activations: Activations
    kwargs: Mapping[str, Any]
    device: torch.device

    def __len__(self) -> int:
        return self.activations.samples

    def __iter__(self) -> Iterator[Batch]:
        states = self.activations
        count = 2 * states.tokens * states.hidden
        with reading(states.path), states.path.open("rb", buffering=0) as file:
            for apart in held_out(states.samples):
                pair = torch.from_numpy(np.fromfile(file, np.float32, count)).reshape(2, 1, states.tokens, -1)
                hidden, reference = pair.to(self.device)
                yield Batch(hidden, reference, self.kwargs, apart)
