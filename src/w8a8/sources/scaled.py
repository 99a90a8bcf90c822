"""Weights of one byte each, FP8 or INT8, with scales: for the tensor, for each row, or for blocks.

| who | tensors | where it is defined |
| --- | --- | --- |
| DeepSeek, Qwen, MiniMax | FP8, `weight_scale_inv` in blocks | transformers, integrations/finegrained_fp8.py |
| compressed-tensors | FP8 or INT8, `weight_scale`, `weight_zero_point` | compressors/naive_quantized, mxfp8 |
| modelopt, AutoFP8, Quark, fbgemm | FP8 or INT8, `weight_scale` | vLLM, quantization/{modelopt,fp8,quark,fbgemm_fp8} |
| bitsandbytes | INT8, `SCB` F32, a row's largest magnitude | functional.py, int8_vectorwise_dequant |

A weight is `code * scale`, a float32 product rounded to the dtype of the tensor. A scale in blocks has one number for
each block of rows and columns, of which the last ones may stick out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
    matrix_shape,
    model_dtype,
    module_of,
    positive,
    row_bytes,
    said,
    shown,
    whole,
    wrong,
)
from w8a8.sources.view import Beside, LogicalTensor, Stretch

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (*FLOATS, "F8_E8M0", "U8")
BLOCK = (128, 128)
"""The blocks where neither a config nor the shapes say otherwise: DeepSeek's, and everyone's since."""

_ONE_127TH = 7.874015718698502e-3  # as bitsandbytes writes it


@dataclass(frozen=True, slots=True)
class Scaled(Rows):
    """Codes of one byte with a grid of scales.

    `beside` begins with the scale and, if `zeros`, the zero points. `block`: rows and columns of the stored matrix
    that share a scale. `factor`: what the product is multiplied by. `across`: a row is a column of the stored matrix.
    """

    codes: str
    block: Block
    zeros: bool = False
    factor: float = 1.0
    across: bool = False

    @property
    def label(self) -> str:
        """FP8 or INT8, and how scales are shared."""
        return f"{'INT8' if self.codes == 'I8' else 'FP8'} {said(self.block)}"

    def transposed(self) -> "Scaled":
        """The same bytes, rows for columns."""
        return replace(self, across=not self.across)

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The bytes of the rows, or of the columns that are the rows."""
        if self.across:
            return Stretch(begin, end - begin, tensor.stored.shape[0], row_bytes(tensor.stored))
        return Rows.stretch(self, tensor, begin, end)

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """The grid of scales, that of zero points, and the rows and columns of a block. Raises `SourceError`."""
        block = whole(self.block, *tensor.stored.shape)
        grid = tuple(map(blocks, tensor.stored.shape, block))
        scale = positive(tensor.beside[0], beside[0]).reshape(grid)
        zero = beside[1].astype(np.int32).reshape(grid) if self.zeros else np.zeros(grid, np.int32)
        if self.across:
            return np.ascontiguousarray(scale.T), np.ascontiguousarray(zero.T), block[::-1]
        return scale, zero, block

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Multiply codes and scales."""
        from w8a8.kernels.cpu import decoding

        scale, zero, block = prepared
        codes: Any = np.frombuffer(data, np.uint8)
        if self.across:
            codes = decoding.turned(codes.reshape(-1, len(out)))
        codes = codes.reshape(out.shape)
        if self.codes == "I8":
            decoding.integers(codes.view(np.int8), scale, zero, block, begin, out, factor=self.factor)
        else:
            decoding.fp8(codes, scale, block, begin, out, wide=self.codes == "F8_E5M2")


def find(tensors: Tensors, declared: Mapping[str, Any]) -> Iterator[LogicalTensor]:
    """Find weights in FP8, and in INT8 with scales. Raises `SourceError`."""
    model = model_dtype(tensors.values())
    for spec in tensors.values():
        if len(spec.shape) not in {2, 3}:
            continue
        if spec.dtype in FP8 and not spec.name.endswith(("scale", "scales", "scale_inv")):
            yield _scaled(tensors, spec, companion(tensors, spec, *_scale_names(spec.name)), declared, model)
        elif spec.dtype == "I8" and (scb := tensors.get(f"{module_of(spec.name)}.SCB")):
            yield _from_bitsandbytes(tensors, spec, scb, model)
        elif spec.dtype == "I8" and (scale := tensors.get(f"{spec.name}_scale")):
            yield _scaled(tensors, spec, scale, declared, model)


def _scale_names(name: str) -> Iterator[str]:
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    yield f"{module_of(name)}.scale" if name.endswith(".weight") else f"{name}_weight_scale"


def _scaled(
    tensors: Tensors, spec: TensorSpec, scale: TensorSpec, declared: Mapping[str, Any], model: str
) -> LogicalTensor:
    expect(scale, spec, SCALES)
    block = _block(spec, scale, _declared_block(declared, spec))
    zero = tensors.get(f"{spec.name}_zero_point")
    if zero is not None:
        expect(zero, spec, ("I8", "F8_E4M3"), scale.shape)
    zeros = zero is not None and zero.dtype == "I8"  # a zero point in FP8 is zero
    beside = (scale, *([zero] if zero else []), *dropped(tensors, spec.name))
    decoder = Scaled(spec.dtype, block, zeros)
    return LogicalTensor(spec.name, dense_dtype(scale, model), spec.shape, spec, decoder, beside)


def _from_bitsandbytes(tensors: Tensors, spec: TensorSpec, scb: TensorSpec, model: str) -> LogicalTensor:
    expect(scb, spec, ("F32",), spec.shape[:1])
    layout = tensors.get(f"{module_of(spec.name)}.weight_format")
    decoder = Scaled("I8", (1, 0), factor=_ONE_127TH)
    return LogicalTensor(spec.name, model, spec.shape, spec, decoder, (scb, *([layout] if layout else [])))


def _block(spec: TensorSpec, scale: TensorSpec, declared: Block | None) -> Block:
    """The rows and columns that share one scale. Raises `SourceError` where the shapes do not say it."""
    rows, columns = spec.shape[-2:]
    own, found = matrix_shape(scale, spec), f"has the shape {list(scale.shape)}"
    height, width = declared or BLOCK
    fits = own == (blocks(rows, height), blocks(columns, width))
    if declared and not fits:
        raise wrong(scale, f"{found}; the config's blocks of {height} x {width} of {shown(spec)} do not give it")
    if fits and (declared or scale.name.endswith("_scale_inv")):
        return height, width
    if all(size == 1 for size in own):
        return 0, 0
    if own in {(rows,), (rows, 1)}:
        return 1, 0
    if own == (1, columns):
        return 0, 1
    if fits:
        return height, width
    if len(own) == 2 and all(own) and not (rows % own[0] or columns % own[1]):
        return rows // own[0], columns // own[1]
    raise wrong(scale, f"{found}, which divides {spec.name}, {shown(spec)}, into no blocks")


def _declared_block(declared: Mapping[str, Any], spec: TensorSpec) -> Block | None:
    """The blocks that a config declares for a weight, if any."""
    weights = declared_weights(declared, module_of(spec.name))
    found = declared.get("weight_block_size") or weights.get("block_structure")
    if not found and isinstance(size := weights.get("group_size"), int) and size > 0:
        found = [1, size]
    if isinstance(found, list) and len(found) == 2 and all(type(n) is int and n > 0 for n in found):
        return found[0], found[1]
    return None
