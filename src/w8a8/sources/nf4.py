"""bitsandbytes' 4-bit weights, NF4 and FP4: indexes into a table of 16 numbers, and the largest magnitude of a block.

`weight` U8 holds all weights of a matrix one after the other, two a byte, the first in the upper four bits;
`weight.absmax` F32 is the factor of each block, and `weight.quant_map` F32 [16] the table. Where these factors are
quantized too, `absmax` is U8, an index into `weight.nested_quant_map` F32 [256], times `weight.nested_absmax` F32 of
its own block, plus an offset. Shape, dtype, sizes and the offset are JSON in `weight.quant_state.bitsandbytes__nf4`.
Defined in bitsandbytes, functional.py (`QuantState`) and csrc/kernels.cu (`kDequantizeBlockwise`).
A weight is `table[code] * absmax`, a float32 product rounded to the dtype. A block of zeros has the factor 0.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from w8a8.checkpoint import TensorSpec
from w8a8.kernels.cpu.bits import Bits
from w8a8.reading import UnfitError, parse_json
from w8a8.sources.beside import Tensors, blocks, companion, expect, finite, numbers, wrong
from w8a8.sources.view import Beside, Decoder, LogicalTensor, Stretch

Read = Callable[[TensorSpec], bytes | bytearray]

_STATE = ".quant_state.bitsandbytes__"
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_MOST = 10_000  # bytes of the JSON; bitsandbytes writes 200


@dataclass(frozen=True, slots=True)
class Table(Decoder):
    """Codes of 4 bits; `block` weights share a factor, `nested` of these another one (0: they are not quantized)."""

    kind: str
    block: int
    nested: int
    offset: float

    @property
    def label(self) -> str:
        """NF4 or FP4, as bitsandbytes has it."""
        return f"bitsandbytes {self.kind.upper()}"

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The bytes of the rows."""
        width = tensor.shape[1] // 2
        return Stretch(begin * width, (end - begin) * width)

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """The table and the factors of all blocks. Raises `SourceError`."""
        specs = tensor.beside
        table, factors = finite(specs[0], numbers(specs[0], beside[0])), beside[1]
        if self.nested:
            steps, outer = (
                finite(spec, numbers(spec, each)) for spec, each in zip(specs[2:4], beside[2:4], strict=True)
            )
            factors = steps[factors] * np.repeat(outer, self.nested)[: factors.size] + np.float32(self.offset)
        return table, finite(specs[1], factors.astype(np.float32))

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Look up and multiply."""
        from w8a8.kernels.cpu import decoding

        table, factors = prepared
        codes = np.frombuffer(data, np.uint8).reshape(len(out), -1)
        decoding.looked_up(codes, table, factors, self.block, begin, out)


def is_here(names: Iterable[str]) -> bool:
    """Whether tensors have shapes among their values, so that headers alone do not say what they are."""
    return any(_STATE in name for name in names)


def find(tensors: Tensors, read: Read) -> Iterator[LogicalTensor]:
    """Find weights in NF4 and FP4; `read` gives a tensor's bytes, which hold their shapes. Raises `SourceError`."""
    for state in tensors.values():
        name, found, kind = state.name.partition(_STATE)
        if found and name in tensors:
            yield _weight(tensors, tensors[name], state, kind, read)


def _weight(tensors: Tensors, spec: TensorSpec, state: TensorSpec, kind: str, read: Read) -> LogicalTensor:
    expect(state, spec, ("U8",))
    expect(spec, spec, ("U8",))
    shape, dtype, block, nested, offset = _state(state, read)
    table, factors = companion(tensors, spec, f"{spec.name}.quant_map"), companion(tensors, spec, f"{spec.name}.absmax")
    count = blocks(shape[0] * shape[1], block)
    if 2 * spec.nbytes != shape[0] * shape[1] or shape[1] % 2:
        raise wrong(spec, f"has {spec.nbytes:,} bytes, which are no {list(shape)} weights of 4 bits in even rows")
    expect(table, spec, ("F32",), (16,))
    expect(factors, spec, ("U8",) if nested else ("F32",), (count,))
    beside = [table, factors]
    if nested:
        steps = companion(tensors, spec, f"{spec.name}.nested_quant_map")
        outer = companion(tensors, spec, f"{spec.name}.nested_absmax")
        expect(steps, spec, ("F32",), (256,))
        expect(outer, spec, ("F32",), (blocks(count, nested),))
        beside += [steps, outer]
    return LogicalTensor(spec.name, dtype, shape, spec, Table(kind, block, nested, offset), (*beside, state))


def _state(state: TensorSpec, read: Read) -> tuple[tuple[int, int], str, int, int, float]:
    """Shape, dtype, weights of a block, blocks of a nested one (0 where there are none), and the offset."""
    try:
        values = parse_json(bytes(read(state)) if state.nbytes <= _MOST else b"", values=100)
    except UnfitError as error:
        raise wrong(state, f"holds no JSON that can be read ({error})") from error
    found = values if isinstance(values, dict) else {}
    shape, sizes = found.get("shape"), (found.get("blocksize"), found.get("nested_blocksize", 0))
    dtype, offset = _DTYPES.get(str(found.get("dtype"))), found.get("nested_offset", 0.0)
    fits = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
    block, nested = (size if type(size) is int and 0 <= size <= 2**16 and size % 2 == 0 else -1 for size in sizes)
    if not (fits and dtype and block > 0 and nested >= 0 and isinstance(offset, float | int)):
        raise wrong(state, "states no shape, dtype and block size that can be read")
    assert isinstance(shape, list)
    return (shape[0], shape[1]), dtype, block, nested, float(offset)
