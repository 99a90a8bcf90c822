"""Integers packed along the inputs, as compressed-tensors writes them ("pack-quantized").

`weight_packed` I32 [out, words] holds the codes of a row one after the other, from the lowest bit on, each of `bits`
and with half their range added; `weight_scale` is [out, groups] (or [out, 1], or one); `weight_zero_point` I32 is
packed in the same way, but down the rows; `weight_shape` I64 says [out, in], and `weight_g_idx` I32 [in], if it is
there, the group of each input. Defined in compressed-tensors, compressors/pack_quantized/{base,helpers}.py.
A weight is `(code - zero) * scale`, a float32 product rounded to the dtype of the scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from w8a8.checkpoint import TensorSpec
from w8a8.kernels.cpu.bits import Bits
from w8a8.sources.beside import (
    FLOATS,
    Block,
    Rows,
    Tensors,
    blocks,
    companion,
    declared_weights,
    dense_dtype,
    dropped,
    expect,
    groups,
    matrix_shape,
    model_dtype,
    module_of,
    named,
    positive,
    said,
    whole,
    wrong,
)
from w8a8.sources.view import Beside, LogicalTensor


@dataclass(frozen=True, slots=True)
class Packed(Rows):
    """Codes of `bits` in words; `block`: rows and columns that share a scale; `columns`: the inputs."""

    bits: int
    block: Block
    columns: int

    @property
    def label(self) -> str:
        """The bits, and how scales are shared."""
        return f"INT{self.bits} {said(self.block)}"

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """Scales and zero points [rows, groups], the block, and the group of each input where they are not in order.

        Raises `SourceError`.
        """
        rows, tensors = tensor.stored.shape[0], named(tensor, beside)
        block = whole(self.block, rows, self.columns)
        grid = blocks(rows, block[0]), blocks(self.columns, block[1])
        shape = tensors.get("weight_shape")
        if shape and tuple(map(int, shape[1].reshape(-1)[-2:])) != (rows, self.columns):
            says = f"says {shape[1].tolist()}, where {self.bits} bits a weight make {[rows, self.columns]}"
            raise wrong(shape[0], says, "state the bits in the config, in config_groups")
        scale = positive(*tensors["weight_scale"]).reshape(grid)
        zero = np.full(grid, 1 << self.bits - 1, np.int32)
        if points := tensors.get("weight_zero_point"):
            zero = self._zero(*points, grid)
        order = tensors.get("weight_g_idx")
        return scale, zero, block, groups(*order, grid[1], block[1]) if order else None

    def _zero(self, spec: TensorSpec, array: Any, grid: tuple[int, int]) -> Any:
        from w8a8.kernels.cpu import decoding

        if spec.dtype == "I8":
            return array.astype(np.int32).reshape(grid) + (1 << self.bits - 1)
        words = decoding.turned(array.view(np.uint32))
        return decoding.turned(decoding.unpacked(words, self.bits, grid[0])).astype(np.int32)

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Unpack, subtract, multiply."""
        from w8a8.kernels.cpu import decoding

        scale, zero, block, order = prepared
        codes = decoding.unpacked(np.frombuffer(data, np.uint32).reshape(len(out), -1), self.bits, self.columns)
        if order is None:
            decoding.integers(codes, scale, zero, block, begin, out)
        else:
            decoding.ordered(codes, scale, zero, order, begin, out)


def find(tensors: Tensors, declared: Mapping[str, Any]) -> Iterator[LogicalTensor]:
    """Find packed integers. Where no config says how many bits they have, it is 4. Raises `SourceError`."""
    model = model_dtype(tensors.values())
    for spec in tensors.values():
        if spec.name.endswith(".weight_packed") and spec.dtype == "I32" and len(spec.shape) in {2, 3}:
            yield _packed(tensors, spec, declared_weights(declared, module_of(spec.name)), model)


def _packed(tensors: Tensors, spec: TensorSpec, weights: Mapping[str, Any], model: str) -> LogicalTensor:
    name = f"{module_of(spec.name)}.weight"
    scale = companion(tensors, spec, f"{name}_scale")
    expect(scale, spec, FLOATS)
    bits, size = weights.get("num_bits", 4), weights.get("group_size")
    if bits not in range(2, 9):
        raise wrong(spec, f"has {bits} bits a weight by the config", "2 to 8 are read")
    # 1) The inputs: as many as the words hold, or as the declared groups have.
    lead, (rows, words) = spec.shape[:-2], spec.shape[-2:]
    own = matrix_shape(scale, spec)
    columns = words * 32 // bits
    size = size if isinstance(size, int) and size > 0 else 0
    if size and len(own) == 2 and blocks(own[1] * size * bits, 32) == words:
        columns = own[1] * size
    # 2) The rows and columns of a scale.
    if all(count == 1 for count in own):
        block = 0, 0
    elif own == (rows, 1):
        block = 1, 0
    elif len(own) == 2 and own[0] == rows and own[1] and columns % own[1] == 0:
        block = 1, columns // own[1]
    else:
        raise wrong(scale, f"has the shape {list(scale.shape)}, which divides {columns} inputs into no groups")
    if size and whole(block, rows, columns)[1] != size:
        raise wrong(scale, f"has the shape {list(scale.shape)}; the config's groups of {size} do not give it")
    # 3) What lies beside it.
    beside = [scale]
    if zero := tensors.get(f"{name}_zero_point"):
        expect(
            zero, spec, ("I32", "I8"), (*lead, blocks(rows * bits, 32), own[-1]) if zero.dtype == "I32" else scale.shape
        )
        beside.append(zero)
    if shape := tensors.get(f"{name}_shape"):
        expect(shape, spec, ("I64", "I32"))
        beside.append(shape)
    if order := tensors.get(f"{name}_g_idx"):
        expect(order, spec, ("I32", "I64"), (*lead, columns))
        beside.append(order)
    dtype = dense_dtype(scale, model)
    decoder = Packed(bits, block, columns)
    return LogicalTensor(name, dtype, (*lead, rows, columns), spec, decoder, (*beside, *dropped(tensors, name)))
