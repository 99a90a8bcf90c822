"""GGUF: ggml's blocks as rows of numbers, as transformers would have them after dequantizing.

Rows are whole runs of blocks (`kernels/cpu/ggml.py`; where their layout is defined is said there). What transformers
does to a tensor's numbers and rows on the way (`checkpoint.mapping.Change`) is done here, in float32, before they are
rounded to the model's dtype once. One GGUF file becomes several shards, each made from a part of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, Shard, TensorSpec
from w8a8.checkpoint.gguf import GGML_TYPES
from w8a8.checkpoint.ggufs import Gguf
from w8a8.checkpoint.mapping import UNCHANGED, Change, Swap
from w8a8.errors import UnsupportedModelError
from w8a8.formats.arithmetic import decode
from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.ggml import DECODED, decode_blocks, round_values
from w8a8.sources.view import PLAIN, Beside, Decoder, LogicalTensor, Stretch, View, ViewShard, part

SHARD_BYTES = 5_000_000_000
"""Bytes that a shard's tensors have before they are quantized, at most, but for a single tensor that is larger."""

_BLOCK = {known.name: (known.elements, known.nbytes) for known in GGML_TYPES.values()}


@dataclass(frozen=True, slots=True)
class Ggml(Decoder):
    """A matrix, or any other tensor as one row, of the ggml dtype `kind`, changed on the way."""

    kind: str
    change: Change = UNCHANGED

    @property
    def label(self) -> str:
        """The dtype, as llama.cpp calls it; "" where its numbers are whole ones."""
        return f"GGUF {self.kind}" if self.kind in DECODED else ""

    @property
    def step(self) -> int:
        """The rows that change places with one another."""
        swap = self.change.rows
        return swap.a * swap.width * (1 if swap.far else swap.b) if swap else 1

    @property
    def border(self) -> int:
        """The first row that changes its place."""
        return self.change.rows.first if self.change.rows else 0

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The blocks of those rows; where `a` runs of rows make them, a run from each."""
        if len(tensor.shape) != 2:
            return Stretch(0, tensor.stored.nbytes)
        width = tensor.stored.nbytes // tensor.shape[0]
        swap = self.change.rows
        if swap is None or begin < swap.first or not swap.far:
            return Stretch(begin * width, (end - begin) * width)
        first, count = (begin - swap.first) // swap.a, (end - begin) // swap.a
        return Stretch((swap.first + first) * width, count * width, swap.a, swap.b * swap.width * width)

    def prepare(self, _tensor: LogicalTensor, _beside: Beside) -> None:
        """Nothing lies beside."""

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, _prepared: Any, out: Bits) -> None:
        """Decode the blocks, and change what is to be changed."""
        elements, nbytes = _BLOCK[self.kind]
        blocks = np.frombuffer(data, np.uint8).reshape(-1, nbytes)
        if self.change == UNCHANGED and self.kind in DECODED:
            decode_blocks(self.kind, blocks, out.reshape(-1, elements))
            return
        values = self._values(blocks).reshape(out.shape if len(tensor.shape) == 2 else tensor.stored.shape)
        if self.change.minus:
            values = values - np.float32(self.change.minus)
        if self.change.log:
            with np.errstate(all="ignore"):
                values = np.log(-values)
        if (swap := self.change.rows) is not None and (len(tensor.shape) != 2 or begin >= swap.first):
            values = _swapped(values, swap, whole=len(tensor.shape) != 2)
        if (swap := self.change.columns) is not None:
            values = _swapped(values.T, swap, whole=True).T
        round_values(values, out)

    def _values(self, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.kind not in DECODED:
            return decode(blocks, self.kind)
        values = np.empty((len(blocks), _BLOCK[self.kind][0]), np.uint32)
        decode_blocks(self.kind, blocks, values)
        return values.view(np.float32)


def _swapped(values: NDArray[np.float32], swap: Swap, *, whole: bool) -> NDArray[np.float32]:
    """Exchange `a` and `b` in the rows of a tensor, or of what was read of it."""
    first = swap.first if whole else 0
    tail = values[first:]
    shape = (1, swap.a, -1, swap.width) if swap.far else (-1, swap.a, swap.b, swap.width)
    tail = tail.reshape(*shape, *values.shape[1:]).swapaxes(1, 2).reshape(tail.shape)
    return np.concatenate([values[:first], tail]) if first else tail


def view(checkpoint: Checkpoint, gguf: Gguf) -> View:
    """See opened GGUF files as the dense checkpoint that transformers would make of them, in shards of some 5 GB.

    Raises `UnsupportedModelError` for a tensor of a dtype that is not decoded.
    """
    groups = [group for shard in checkpoint.shards for group in _groups(shard.name, gguf, checkpoint.path)]
    shards = []
    for number, group in enumerate(groups, 1):
        target = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        shards.append(replace(group, target=target))
    return View(checkpoint, checkpoint.config, tuple(shards), gguf.label)


def _groups(name: str, gguf: Gguf, folder: Path) -> Iterator[ViewShard]:
    """Share out the tensors of the file `name` among shards."""
    header = gguf.headers[name]
    stored: list[TensorSpec] = []
    seen: list[LogicalTensor] = []
    begin = 0
    for spec in header.tensors:
        made = list(_seen(spec, gguf, folder))
        nbytes = sum(tensor.nbytes for tensor in (*seen, *made))
        if seen and made and nbytes > SHARD_BYTES:
            yield ViewShard(Shard(name, header.file_size, tuple(stored)), tuple(seen), begin=begin, end=spec.offset)
            stored, seen, begin = [], [], spec.offset
        stored.append(spec)
        seen += made
    if seen:
        yield ViewShard(Shard(name, header.file_size, tuple(stored)), tuple(seen), begin=begin)


def _seen(stored: TensorSpec, gguf: Gguf, folder: Path) -> Iterator[LogicalTensor]:
    """The logical tensors that a stored one becomes: none, one, or one per expert."""
    made = gguf.model.parameters.get(stored.name, ())
    change = gguf.model.changes.get(stored.name, UNCHANGED)
    if made and stored.dtype not in DECODED | {"F32", "F16", "BF16"}:
        raise UnsupportedModelError(
            f"{folder / stored.shard}: {stored.name} is {stored.dtype}, which this version cannot decode"
        )
    decoder = PLAIN if stored.dtype == gguf.model.dtype and change == UNCHANGED else Ggml(stored.dtype, change)
    for number, parameter in enumerate(made):
        own = part(stored, number) if len(made) > 1 else stored
        yield LogicalTensor(parameter.name, gguf.model.dtype, parameter.shape, own, decoder)
