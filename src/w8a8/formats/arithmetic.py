"""The scale rules: this project's own, and those of the tools whose bits a compatibility mode reproduces.

Ours is amax/127 in float32, so that code 127 is the row's largest weight and nothing is clipped. AMD Quark and
llm-compressor divide by 127.5 (half the range from -128 to 127), round the scale to the weights' dtype and floor it;
their rows of tiny weights become zeros. The formulas are read from their sources (Quark `calculate_int_quant_params`,
compressed-tensors `calculate_qparams`) and checked bit for bit against their output.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.formats.base import Arithmetic

Buffer = bytes | bytearray | memoryview | NDArray[Any]

Float32s = NDArray[np.float32]

_SMALLEST_NORMAL = np.float32(2.0**-126)
_LARGEST = np.finfo(np.float32).max
_QUARK_FLOOR = np.float32(2.0**-23)
_LLM_COMPRESSOR_ZERO_SCALE = {"BF16": np.float32(2.0**-7), "F16": np.float32(2.0**-10), "F32": np.float32(2.0**-23)}


def exact_scales(amax: Float32s, dtype: str) -> Float32s:  # noqa: ARG001 - the same for every dtype
    """Compute amax/127 in float32 for rows of any finite magnitude: positive, never clipping, 127 times it finite.

    Rounding to nearest would break that at the two ends of the range. Where the quotient is subnormal, float32 has no
    relative precision left, so it is rounded up: a larger scale costs resolution, a smaller one would clip the row's
    largest weights. Where 127 times the scale passes float32's largest number, it is rounded down: the code 127 must
    not dequantize to infinity. An all-zero row gets 1.
    """
    scales = amax / np.float32(127)
    top = scales.astype(np.float64) * 127
    beyond = ((scales < _SMALLEST_NORMAL) & (top < amax)) | (top > _LARGEST)
    scales = np.where(beyond, np.nextafter(scales, np.float32(1)), scales)
    return np.where(amax == 0, np.float32(1), scales)


def quark_scales(amax: Float32s, dtype: str, observer: str) -> Float32s:
    """Compute AMD Quark's scales: amax/127.5 rounded to the weights' dtype, at least 2**-23.

    `observer` is the dtype of its min/max buffers: F32 in 0.13; in 0.11 the config's `torch_dtype`, which may be
    narrower than the weights.
    """
    seen = round_to(round_to(amax, observer), dtype)
    return np.maximum(round_to(seen / np.float32(127.5), dtype), _QUARK_FLOOR)


def llm_compressor_scales(amax: Float32s, dtype: str) -> Float32s:
    """Compute llm-compressor's scales: amax/127.5 rounded to the weights' dtype, its epsilon where that is zero."""
    scales = round_to(amax / np.float32(127.5), dtype)
    return np.where(scales == 0, _LLM_COMPRESSOR_ZERO_SCALE[dtype], scales).astype(np.float32)


EXACT = Arithmetic(exact_scales)
LLM_COMPRESSOR = Arithmetic(llm_compressor_scales, quotient="divide-rounded", low=-128)


def quark(observer: str) -> Arithmetic:
    """Give AMD Quark's arithmetic for an observer dtype."""
    return Arithmetic(functools.partial(quark_scales, observer=observer), quotient="reciprocal", low=-128)


def round_to(values: Float32s, dtype: str) -> Float32s:
    """Round `values` to the safetensors dtype BF16, F16 or F32, nearest even, subnormals kept; return float32."""
    if dtype == "BF16":
        return _widen(bf16_bits(values))
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32) if dtype == "F16" else values


def bf16_bits(values: Float32s) -> NDArray[np.uint16]:
    """Round finite or infinite float32 `values` to BF16, ties to even; return bit patterns."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _widen(bits: NDArray[np.uint16]) -> Float32s:
    """Widen BF16 bit patterns to the float32 of the same value."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def decode(data: Buffer, dtype: str) -> Float32s:
    """Turn the bytes of a BF16, F16 or F32 tensor into float32: the inverse of `encode`."""
    if dtype == "BF16":
        return _widen(np.frombuffer(data, "<u2"))
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def encode(values: Float32s, dtype: str) -> bytes:
    """Turn `values` into the little-endian bytes of a BF16, F16 or F32 tensor."""
    if dtype == "BF16":
        return bf16_bits(values).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype("<f2" if dtype == "F16" else "<f4").tobytes()
