"""Weights in FP4 E2M1, two a byte, the first in the lower four bits, with a scale for each 16 or 32 inputs.

| who | tensors | where it is defined |
| --- | --- | --- |
| gpt_oss | MXFP4, `*_blocks` U8 [E, out, groups, 16], `*_scales` | transformers, integrations/mxfp4.py |
| compressed-tensors | MXFP4, `weight_packed` U8 [out, in / 2], `weight_scale` U8 | compressors/mxfp4 |
| Quark | MXFP4, `weight` U8, `weight_scale` U8 | vLLM, quantization/quark |
| DeepSeek | MXFP4, `weight` I8, `weight_scale_inv` or `scale` | transformers, integrations/finegrained_fp8.py |
| compressed-tensors | NVFP4, `weight_packed`, `weight_scale` F8_E4M3, `weight_global_scale` F32 | compressors/nvfp4 |
| modelopt | NVFP4, `weight` U8, `weight_scale` F8_E4M3, `weight_scale_2` F32 | modelopt, qtensor/nvfp4_tensor.py |

MXFP4's scale is a power of two, its exponent plus 127 in a byte, for 32 weights; NVFP4's is FP8, for 16, divided by
compressed-tensors' global scale or times modelopt's second one, in float32. A weight is `code * scale`, a float32
product rounded to the model's dtype. U8 may be F4 instead, with [out, in] for its shape. What transformers makes of
gpt_oss's blocks is their transpose, [E, in, out].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from w8a8.checkpoint import TensorSpec
from w8a8.kernels.cpu.bits import Bits
from w8a8.sources.beside import (
    Rows,
    Tensors,
    companion,
    dropped,
    expect,
    model_dtype,
    module_of,
    positive,
    row_bytes,
    shown,
    wrong,
)
from w8a8.sources.view import Beside, LogicalTensor, Stretch

MX, NV = 32, 16
"""Weights that share a scale."""

_EXPONENTS = ("U8", "F8_E8M0")


@dataclass(frozen=True, slots=True)
class Fp4(Rows):
    """Rows of FP4 numbers; `group` share a scale.

    `beside` begins with the scales and, where `outer` is "/" or "*", the scale that they are divided by or multiplied
    with. `across`: a row is a column of the stored matrix.
    """

    group: int
    outer: str = ""
    across: bool = False

    @property
    def label(self) -> str:
        """MXFP4 or NVFP4."""
        return "MXFP4" if self.group == MX else "NVFP4"

    @property
    def step(self) -> int:
        """The columns that share a byte, where they are rows."""
        return 2 if self.across else 1

    def transposed(self) -> "Fp4":
        """The same bytes, rows for columns."""
        return replace(self, across=not self.across)

    def stretch(self, tensor: LogicalTensor, begin: int, end: int) -> Stretch:
        """The bytes of the rows, or of the columns that are the rows."""
        if self.across:
            return Stretch(begin // 2, (end - begin) // 2, tensor.stored.shape[0], row_bytes(tensor.stored))
        return Rows.stretch(self, tensor, begin, end)

    def prepare(self, tensor: LogicalTensor, beside: Beside) -> Any:
        """The scales, [rows, groups] as stored, or the transpose. Raises `SourceError`."""
        from w8a8.kernels.cpu import decoding

        scale = positive(tensor.beside[0], beside[0]).reshape(tensor.stored.shape[0], -1)
        if self.outer:
            with np.errstate(over="ignore", under="ignore"):
                by = positive(tensor.beside[1], beside[1]).reshape(())
                scale = positive(tensor.beside[1], scale / by if self.outer == "/" else scale * by)
        return decoding.turned(scale) if self.across else scale

    def decode(self, tensor: LogicalTensor, begin: int, data: memoryview, prepared: Any, out: Bits) -> None:  # noqa: ARG002
        """Multiply codes and scales."""
        from w8a8.kernels.cpu import decoding

        codes = np.frombuffer(data, np.uint8)
        if self.across:
            turned = decoding.turned(codes.reshape(-1, len(out) // 2))
            decoding.fp4_down(turned, prepared, self.group, begin, out)
        else:
            decoding.fp4(codes.reshape(len(out), -1), prepared[begin : begin + len(out)], out)


def find(tensors: Tensors, declared: Mapping[str, Any]) -> Iterator[LogicalTensor]:  # noqa: ARG001 - it says nothing more
    """Find weights in MXFP4 and NVFP4. Raises `SourceError`."""
    model = model_dtype(tensors.values())
    for spec in tensors.values():
        name = spec.name
        if spec.dtype == "U8" and name.endswith("_blocks") and len(spec.shape) in {3, 4}:
            yield _blocks(tensors, spec, model)
        elif spec.dtype in {"U8", "F4"} and name.endswith(".weight_packed") and len(spec.shape) in {2, 3}:
            yield _packed(tensors, spec, f"{module_of(name)}.weight", model)
        elif spec.dtype in {"U8", "I8", "F4"} and name.endswith(".weight") and len(spec.shape) in {2, 3}:
            names = (f"{name}_scale_inv", f"{module_of(name)}.scale", f"{name}_scale" if spec.dtype != "I8" else "")
            if any(each in tensors for each in names):
                yield _packed(tensors, spec, name, model, *names)


def _blocks(tensors: Tensors, spec: TensorSpec, model: str) -> LogicalTensor:
    name = spec.name.removesuffix("_blocks")
    scales = companion(tensors, spec, f"{name}_scales")
    expect(scales, spec, _EXPONENTS, spec.shape[:-1])
    *lead, rows, groups, nbytes = spec.shape
    if 2 * nbytes != MX:
        raise wrong(spec, f"is {shown(spec)}, where a block of MXFP4 has 16 bytes")
    return LogicalTensor(name, model, (*lead, groups * MX, rows), spec, Fp4(MX, across=True), (scales,))


def _packed(tensors: Tensors, spec: TensorSpec, name: str, model: str, *scales: str) -> LogicalTensor:
    scale = companion(tensors, spec, *filter(None, scales or (f"{name}_scale",)))
    expect(scale, spec, (*_EXPONENTS, "F8_E4M3"))
    group = NV if scale.dtype == "F8_E4M3" else MX
    *lead, rows, last = spec.shape
    inputs = last if spec.dtype == "F4" else 2 * last
    if inputs % group:
        raise wrong(spec, f"is {shown(spec)}, whose {inputs} inputs are no blocks of {group}")
    expect(scale, spec, (scale.dtype,), (*lead, rows, inputs // group))
    beside, outer = [scale], ""
    if group == NV:
        second = companion(tensors, spec, f"{name}_global_scale", f"{name}_scale_2")
        one = [(), (1,)] if not lead else [tuple(lead), (*lead, 1), (1,), ()]
        expect(second, spec, ("F32",), *one)
        beside.append(second)
        outer = "/" if second.name.endswith("_global_scale") else "*"
    return LogicalTensor(
        name, model, (*lead, rows, inputs), spec, Fp4(group, outer), (*beside, *dropped(tensors, name))
    )
