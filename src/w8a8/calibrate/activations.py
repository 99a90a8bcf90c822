"""What passes between two decoder layers, for all samples, in a file.

The quantized layers before produce it. A file holds one sample after the other: its length, and safetensors. Samples
are read and written one at a time and so take the memory of one; the page cache keeps as much of the file in RAM as
fits.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

from w8a8.errors import UnreadableError
from w8a8.reading import open_file, reading
from w8a8.runtime.calls import States
from w8a8.storage.writer import SequentialWriter

HELD_OUT_EVERY = 8
"""One of this many samples is held out, to judge candidates by."""
LENGTH = 8
"""Bytes of a sample's length, little-endian."""
HIDDEN = "hidden"


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
    """The states that enter a layer, in a file of tensors by name, for one sample after the other."""

    path: Path

    def write(self, states: Iterable[States]) -> None:
        """Write the states of every sample, and sync the file. Raises `DiskFullError` or `UnwritableError`."""
        with SequentialWriter(self.path) as writer:
            for each in states:
                tensors = {HIDDEN: each.hidden, **each.left}
                data = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
                writer.append(len(data).to_bytes(LENGTH, "little"))
                writer.append(data)
            writer.finish()

    def states(self, device: torch.device) -> Iterator[States]:
        """Read the states of every sample onto `device`.

        Raises `UnreadableError`, also where the file is not what was written.
        """
        with reading(self.path), io.BufferedReader(open_file(self.path)) as file:
            left = self.path.stat().st_size
            while left:
                length = int.from_bytes(file.read(LENGTH), "little")
                left -= LENGTH + length
                if left < 0:
                    raise UnreadableError(f"{self.path}: it ends in the middle of a sample; run again")
                tensors = {name: tensor.to(device) for name, tensor in load(file.read(length)).items()}
                yield States(tensors.pop(HIDDEN), tensors)
