"""LLVM IR for the floats of 8 and of 4 bits: each is widened by way of an FP16 of the same bit fields.

An FP8 or FP4 number, its fields moved to where FP16 has them, is that FP16 but for the exponent's bias, subnormals
too. So shifts, the CPU's own FP16 conversion and one exact product do what a table of 256 floats would do, and they
vectorize: a table's lookups do not.
"""

from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba import types

from w8a8.kernels.cpu.jit import intrinsic

_HALF = ir.IntType(16)
_NAN = _HALF(0x7E00)

Value = Any  # an llvmlite value; llvmlite has no types


def _widen(builder: Builder, half: Value, bias: float) -> Value:
    """Convert the bits of an FP16 to float32, times `bias`, a power of two."""
    value = builder.fpext(builder.bitcast(half, ir.HalfType()), ir.FloatType())
    return builder.fmul(value, ir.Constant(ir.FloatType(), bias))


def _half(builder: Builder, sign: Value, magnitude: Value, shift: int) -> Value:
    """Put the sign, bit 7 of `sign`, and `magnitude` to the left of `shift` bits where FP16 has them."""
    top = builder.shl(builder.and_(sign, _HALF(0x80)), _HALF(8))
    return builder.or_(top, builder.shl(magnitude, _HALF(shift)))


@intrinsic
def e4m3(_context: Any, _code: Any) -> Any:
    """Return the float32 of an FP8 E4M3 number (OCP "FN": no infinity, magnitude 0x7F is NaN)."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        code = builder.zext(args[0], _HALF)
        magnitude = builder.and_(code, _HALF(0x7F))
        half = _half(builder, code, magnitude, 7)
        nan = builder.icmp_unsigned("==", magnitude, _HALF(0x7F))
        return _widen(builder, builder.select(nan, builder.or_(half, _NAN), half), 256.0)

    return types.float32(types.uint8), generate


@intrinsic
def e5m2(_context: Any, _code: Any) -> Any:
    """Return the float32 of an FP8 E5M2 number: the upper byte of an FP16."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return _widen(builder, builder.shl(builder.zext(args[0], _HALF), _HALF(8)), 1.0)

    return types.float32(types.uint8), generate


@intrinsic
def e2m1(_context: Any, _code: Any) -> Any:
    """Return the float32 of the FP4 E2M1 number in the lower four bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6, with a sign."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        code = builder.zext(args[0], _HALF)
        return _widen(builder, _half(builder, builder.shl(code, _HALF(4)), builder.and_(code, _HALF(7)), 9), 16384.0)

    return types.float32(types.uint8), generate
