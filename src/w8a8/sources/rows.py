"""The one place where stored bytes become numbers.

Whoever reads weights (the quantizer, verification, the streamed model, the report) gets them here; how each spelling is
decoded is its `Decoder`'s business.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, Shaped, TensorSpec
from w8a8.checkpoint.reader import inside
from w8a8.checkpoint.stream import Feed, bytes_of, read_block, tensor_bytes
from w8a8.formats.arithmetic import Buffer, decode
from w8a8.kernels.cpu.bits import BITS, Bits
from w8a8.reading import open_file, reading
from w8a8.sources.blocks import RowBlock, grid, stretch, tensor_blocks
from w8a8.sources.view import Joined, LogicalTensor

ARRAYS = {"BOOL": "?", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"} | {
    f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)
}
"""safetensors dtype -> numpy's; what numpy has no type for are unsigned integers: BF16 of two bytes, FP8 of one."""


class RowReader:
    """Makes rows of logical tensors of the checkpoint in a folder. It belongs to one thread."""

    def __init__(self, folder: Path, feeds: Mapping[str, Feed] | None = None) -> None:
        """Of files that are still arriving, `feeds` says by their names where they are."""
        self._folder, self._feeds = folder, feeds or {}
        self._scratch: Any = np.empty(0, np.uint8)
        self._prepared: tuple[LogicalTensor | None, Any] = (None, None)

    def content(self, block: RowBlock, data: memoryview) -> memoryview:
        """Give the rows of a block as the bytes of a dense tensor; `data` are its bytes as stored.

        They are valid until the next call, and, where nothing had to be decoded, as long as `data`. Raises a source
        error where what lies beside the tensor does not fit it.
        """
        matrix = block.matrix
        assert matrix is not None
        if matrix.plain and matrix.every == 1:
            return data
        columns, kind = grid(matrix)[1], BITS[matrix.dtype]
        if matrix.plain:
            bits: Any = np.frombuffer(data, kind).reshape(-1, columns)
        else:
            count = (block.end - block.begin - 1) * matrix.every + 1
            bits = self._space(count * columns * kind.itemsize).view(kind).reshape(count, columns)
            first = matrix.first + block.begin * matrix.every
            matrix.decoder.decode(matrix, first, data, self._prepare(matrix), bits)
        chosen: Any = np.ascontiguousarray(bits[:: matrix.every])
        return memoryview(chosen).cast("B")

    def read(self, tensor: LogicalTensor) -> bytearray:
        """Read a whole tensor: the bytes of a dense one."""
        found = bytearray(tensor.nbytes)
        size = tensor.nbytes // max(tensor.numel, 1)
        path = self._place(tensor.stored)
        with reading(path), open_file(path) as file:
            for block in tensor_blocks(tensor):
                data = memoryview(bytearray(block.size))
                read_block(file.fileno(), data, block, path)
                found[block.at * size : (block.at + block.numel) * size] = self.content(block, data)
        return found

    def part(self, matrix: LogicalTensor, begin: int, end: int) -> bytes:
        """Read rows `begin` to `end` of a matrix: the bytes of a dense one."""
        step, width = matrix.decoder.step, matrix.nbytes // matrix.shape[0]
        first, last = begin // step * step, min(-(-end // step) * step, matrix.shape[0])
        place, path = stretch(matrix, first, last), self._place(matrix.stored)
        offset = matrix.stored.offset + place.offset
        block = RowBlock(
            offset, place.nbytes, place.runs, place.stride, tensor=matrix, matrix=matrix, begin=first, end=last
        )
        data = memoryview(bytearray(block.size))
        with reading(path), open_file(path) as file:
            read_block(file.fileno(), data, block, path)
        return bytes(self.content(block, data)[(begin - first) * width : (end - first) * width])

    def expert(self, joined: Joined, number: int) -> memoryview:
        """Read the parts of one expert: its bytes in the tensor that holds all."""
        parts = joined.experts[number]
        shape, kind = parts[0].shape, BITS[joined.dtype]
        read = [np.frombuffer(self.read(part), kind).reshape(shape) for part in parts]
        whole = np.stack(read, 1 if joined.interleaved else 0).reshape(-1, *shape[1:])
        stored: Any = np.ascontiguousarray(whole.T if joined.transposed else whole)
        return memoryview(stored).cast("B")

    def values(self, tensor: LogicalTensor) -> NDArray[np.float32]:
        """Read a whole tensor as float32, in its shape."""
        return decode(self.read(tensor), tensor.dtype).reshape(tensor.shape)

    def _prepare(self, matrix: LogicalTensor) -> Any:
        of, prepared = self._prepared
        if of is not matrix:
            prepared = matrix.decoder.prepare(matrix, [self._array(spec) for spec in matrix.beside])
            self._prepared = matrix, prepared
        return prepared

    def _array(self, spec: TensorSpec) -> NDArray[Any]:
        return np.frombuffer(bytes_of(self._place(spec), spec), ARRAYS.get(spec.dtype, "<u1")).reshape(spec.shape)

    def _place(self, spec: TensorSpec) -> Path:
        """The file in which a stored tensor lies, once it is there."""
        if feed := self._feeds.get(spec.shard):
            feed.wait(spec.offset + spec.nbytes)
            return feed.path
        return inside(self._folder, spec.shard)

    def _space(self, nbytes: int) -> Any:
        if len(self._scratch) < nbytes:
            self._scratch = np.empty(nbytes, np.uint8)
        return self._scratch[:nbytes]


def rows(tensor: Shaped, data: Buffer) -> Bits:
    """Give whole rows of a dense tensor as bit patterns, without a copy.

    Args:
        tensor: a tensor in BF16, F16 or F32.
        data: bytes of any number of its rows; a vector or a scalar counts as one row an element.

    Returns:
        `[rows, columns]` in the integer type of the dtype (`BITS`); `torch` and `numpy` can view it as numbers.
    """
    columns = tensor.shape[1] if len(tensor.shape) == 2 else 1
    bits: Bits = np.frombuffer(data, BITS[tensor.dtype]).reshape(-1, columns)
    return bits


def values(tensor: Shaped, data: Buffer) -> NDArray[np.float32]:
    """Give whole rows of a dense tensor as float32 `[rows, columns]`, exactly."""
    bits = rows(tensor, data)
    return decode(bits, tensor.dtype).reshape(bits.shape)


def read_values(checkpoint: Checkpoint, tensor: TensorSpec) -> NDArray[np.float32]:
    """Read a whole tensor of a checkpoint as float32, flat. Raises what `tensor_bytes` raises."""
    return values(tensor, tensor_bytes(checkpoint.path, tensor)).reshape(-1)
