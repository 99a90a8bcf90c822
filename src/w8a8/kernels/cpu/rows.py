"""The two inner loops of quantizing on a CPU: a row's largest magnitude, and a row's INT8 codes.

Weights arrive as the bit patterns that lie on disk, so nothing is converted ahead of time: BF16 and FP16 as 16-bit
integers, FP32 as 32-bit ones. Clearing the sign bit of an IEEE number leaves an integer that orders as its magnitude
does, so the amax loop is an integer maximum whatever the format, and NaN and infinity come out as the largest rows of
all: one `isfinite` on the amax vector finds them, and the hot loop never asks.

Both loops vectorize (AVX-512: 32 elements per step) and pass weights many times as fast as SHA-256 does on the same
core, which is why there is nothing cleverer here.

Numba tells the formats apart by the integer type: uint16 is BF16, int16 is FP16, uint32 is FP32 (`BITS`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from w8a8.kernels.cpu.bits import Bits

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_intrinsic: Decorator = intrinsic  # Numba leaves it untyped


def _jit(**options: Any) -> Decorator:
    """Compile without the GIL, cached on disk where a cache can be written and in memory where none can."""

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # "cannot cache function: no locator available": read-only install, no home
            return numba.njit(nogil=True, error_model="numpy", **options)(function)  # type: ignore[no-any-return]

    return compile_


@_intrinsic
def _as_float32(_context: Any, bits: Any) -> Any:
    """One element's bit pattern as the float32 of the same value."""

    def bf16(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        word = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(word, ir.FloatType())

    def fp16(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    def fp32(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    generate = {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]
    return types.float32(bits), generate


@_intrinsic
def _round_like(_context: Any, bits: Any, value: Any) -> Any:
    """A float32 rounded to the format of `bits`, half to even; still as float32."""

    def bf16(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        word = builder.bitcast(args[1], i32)
        odd = builder.and_(builder.lshr(word, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        word = builder.add(builder.add(word, ir.Constant(i32, 0x7FFF)), odd)
        return builder.bitcast(builder.and_(word, ir.Constant(i32, 0xFFFF0000)), ir.FloatType())

    def fp16(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        return builder.fpext(builder.fptrunc(args[1], ir.HalfType()), ir.FloatType())

    def fp32(_c: Any, _b: ir.IRBuilder, _s: Any, args: Any) -> Any:
        return args[1]

    generate = {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]
    return types.float32(bits, value), generate


@_intrinsic
def _magnitude_bits(_context: Any, value: Any) -> Any:
    """|value| as an integer that orders the same way: LLVM vectorizes an integer maximum, but not one of floats."""

    def generate(_c: Any, builder: ir.IRBuilder, _s: Any, args: Any) -> Any:
        return builder.and_(builder.bitcast(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 0x7FFFFFFF))

    return types.uint32(value), generate


@_jit()
def _to_int8(quotient, low):  # type: ignore[no-untyped-def]
    return np.int8(np.int32(min(max(np.rint(quotient), low), np.float32(127))))


@_jit()
def _row_max(bits, mask, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        top = mask & bits[i, 0]
        for j in range(bits.shape[1]):
            top = max(top, bits[i, j] & mask)
        out[i] = top


@_jit()
def _codes_divide(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(_as_float32(bits[i, j]) / s, low)


@_jit()
def _codes_reciprocal(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        inverse = np.float32(1) / scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(_as_float32(bits[i, j]) * inverse, low)


@_jit()
def _codes_divide_rounded(bits, scale, low, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        for j in range(bits.shape[1]):
            out[i, j] = _to_int8(_round_like(bits[i, j], _as_float32(bits[i, j]) / s), low)


@_jit(fastmath={"reassoc", "nsz"})  # sums may be taken in vector order
def _row_error(bits, codes, scale, out):  # type: ignore[no-untyped-def]
    for i in range(bits.shape[0]):
        s = scale[i]
        signal = 0.0
        noise = 0.0
        worst = np.uint32(0)
        saturated = np.int32(0)
        nonzero = np.int32(0)
        for j in range(bits.shape[1]):
            x = _as_float32(bits[i, j])
            q = codes[i, j]
            error = np.float32(x - np.float32(q) * s)
            signal += np.float64(x) * np.float64(x)
            noise += np.float64(error) * np.float64(error)
            worst = max(worst, _magnitude_bits(error))
            saturated += np.int32((q == 127) | (q <= -127))
            nonzero += np.int32(q != 0)
        out[i, 0] = signal
        out[i, 1] = noise
        out[i, 2] = worst
        out[i, 3] = saturated
        out[i, 4] = nonzero


def row_amax(bits: Bits) -> NDArray[np.float32]:
    """Largest magnitude of each row of `bits` [rows, columns], as float32 [rows].

    A row that holds NaN or infinity comes out as NaN or infinity. `columns` may not be 0.
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

    `bits` [rows, columns] holds finite weights w; `scale` [rows] is float32 and positive. `quotient` says how w / scale
    is computed, see `w8a8.formats.Arithmetic`.
    """
    _CODES[quotient](bits, scale, np.float32(low), out)


@dataclass(frozen=True, slots=True)
class RowError:
    """What quantizing did to each row: arrays of shape [rows]."""

    signal: NDArray[np.float64]
    """Sum of squares of the weights."""
    noise: NDArray[np.float64]
    """Sum of squares of `weight - code * scale`."""
    worst: NDArray[np.float32]
    """Largest `|weight - code * scale|`, in units of the weights."""
    saturated: NDArray[np.int64]
    """Codes at 127 or at -127 and below."""
    nonzero: NDArray[np.int64]
    """Codes other than 0."""


def row_error(bits: Bits, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> RowError:
    """Measure `codes` [rows, columns] and `scale` [rows] against the weights `bits` [rows, columns]."""
    out = np.empty((bits.shape[0], 5), np.float64)
    _row_error(bits, codes, scale, out)
    worst = out[:, 2].astype(np.uint32).view(np.float32)
    return RowError(out[:, 0], out[:, 1], worst, out[:, 3].astype(np.int64), out[:, 4].astype(np.int64))
