"""The inner loops of quantizing on a CPU: a row's largest magnitude, its INT8 codes, and the error of its codes.

Weights arrive as the bit patterns on disk, so nothing is converted ahead of time: BF16 and FP16 as 16-bit integers,
FP32 as 32-bit ones. An IEEE number without its sign bit is an integer that orders as the magnitude does. So the amax
loop is an integer maximum for every format, and NaN and infinity come out as the largest magnitudes: one `isfinite` on
the amax vector finds them, and the hot loop checks nothing.

The loops vectorize (AVX-512: 32 elements per step) and are many times as fast as SHA-256 on the same core, so nothing
cleverer is needed here.

Numba tells the formats apart by the integer type: uint16 is BF16, int16 is FP16, uint32 is FP32 (`bits.BITS`).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w8a8.kernels.cpu.bits import Bits
from w8a8.kernels.cpu.ir import as_float32, magnitude_bits, round_like
from w8a8.kernels.cpu.jit import jit


@jit()
def _to_int8(quotient, low):  # type: ignore[no-untyped-def]
    return np.int8(np.int32(min(max(np.rint(quotient), low), np.float32(127))))


@jit()
def _row_max(bits, mask, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        top = mask & bits[i, 0]
        for j in range(bits.shape[1]):
            top = max(top, bits[i, j] & mask)
        out[i] = top


@jit()
def _codes_divide(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(as_float32(bits[i, j]) / s, low)


@jit()
def _codes_reciprocal(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        inverse = np.float32(1) / scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(as_float32(bits[i, j]) * inverse, low)


@jit()
def _codes_divide_rounded(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(round_like(bits[i, j], as_float32(bits[i, j]) / s), low)


@jit(fastmath={"reassoc", "nsz"})  # sums may be taken in vector order
def _row_error(bits, codes, scale, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        signal = 0.0
        noise = 0.0
        worst = np.uint32(0)
        saturated = np.int32(0)
        nonzero = np.int32(0)
        for j in range(bits.shape[1]):
            x = as_float32(bits[i, j])
            q = codes[i, j]
            error = np.float32(x - np.float32(q) * s)
            signal += np.float64(x) * np.float64(x)
            noise += np.float64(error) * np.float64(error)
            worst = max(worst, magnitude_bits(error))
            saturated += np.int32((q == 127) | (q <= -127))
            nonzero += np.int32(q != 0)
        out[i, 0] = signal
        out[i, 1] = noise
        out[i, 2] = worst
        out[i, 3] = saturated
        out[i, 4] = nonzero


def row_amax(bits: Bits) -> NDArray[np.float32]:
    """Return the largest magnitude of each row of `bits` [rows, columns], as float32 [rows].

    A row that holds NaN or infinity gives NaN or infinity. `columns` must not be 0.
    """
    top = np.empty(bits.shape[0], bits.dtype)
    _row_max(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> (bits.dtype.kind == "u")), top)
    if bits.dtype == np.uint16:
        return (top.astype(np.uint32) << 16).view(np.float32)
    return top.view(np.float16).astype(np.float32) if bits.dtype == np.int16 else top.view(np.float32)


_CODES = {"divide": _codes_divide, "reciprocal": _codes_reciprocal, "divide-rounded": _codes_divide_rounded}


def row_codes(
    bits: Bits, scale: NDArray[np.float32], out: NDArray[np.int8], quotient: str = "divide", low: int = -127
) -> None:
    """Write `clip(round_half_even(w / scale), low, 127)` into `out` [rows, columns].

    `bits` [rows, columns] holds finite weights w; `scale` [rows] is float32 and positive. `quotient` chooses how
    w / scale is computed: see `w8a8.formats.Arithmetic`.
    """
    _CODES[quotient](bits, scale, np.float32(low), out)


@dataclass(frozen=True, slots=True)
class RowError:
    """The error of each quantized row: arrays of shape [rows]."""

    signal: NDArray[np.float64]
    """Sum of squares of the weights."""
    noise: NDArray[np.float64]
    """Sum of squares of `weight - code * scale`."""
    worst: NDArray[np.float32]
    """Largest `|weight - code * scale|`, in units of the weights."""
    saturated: NDArray[np.int64]
    """Number of codes that are 127, or -127 and below."""
    nonzero: NDArray[np.int64]
    """Number of codes other than 0."""


def row_error(bits: Bits, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> RowError:
    """Measure `codes` [rows, columns] and `scale` [rows] against the weights `bits` [rows, columns]."""
    out = np.empty((bits.shape[0], 5), np.float64)
    _row_error(bits, codes, scale, out)
    worst = out[:, 2].astype(np.uint32).view(np.float32)
    return RowError(out[:, 0], out[:, 1], worst, out[:, 3].astype(np.int64), out[:, 4].astype(np.int64))
