"""LLVM IR for everything that Numba cannot say: bit patterns, addresses, threads, functions of their own.

Every public function in lower case that Numba compiles is an intrinsic: it generates its own instructions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba import types
from numba.core import cgutils

from w8a8.kernels.cpu.jit import intrinsic

BYTE, HALF, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))

Value = Any  # an llvmlite value; llvmlite has no types


def long(value: int) -> Value:
    """Make a constant of 64 bits."""
    return ir.Constant(LONG, value)


def pointer(builder: Builder, type_: ir.Type, *parts: Value) -> Value:
    """Return the sum of `parts` as a pointer to `type_`."""
    address = parts[0]
    for part in parts[1:]:
        address = builder.add(address, part)
    return builder.inttoptr(address, type_.as_pointer())


def function(builder: Builder, name: str, result: ir.Type, *arguments: ir.Type) -> Value:
    """Declare the function or LLVM intrinsic `name`."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


@dataclass(frozen=True, slots=True)
class Tile:
    """An inner loop: a function of its own, so that it has every register. Its `arguments` are int64.

    `features`: those of LLVM's that it is compiled for, where they are not those of its module.
    """

    name: str
    arguments: int
    body: Callable[[Builder, Sequence[Value]], None]
    features: str = ""

    def define(self, module: ir.Module) -> Value:
        """Return the function in `module`, defined where it is not there yet."""
        if self.name not in module.globals:
            made = ir.Function(module, ir.FunctionType(ir.VoidType(), [LONG] * self.arguments), self.name)
            made.attributes.add("noinline")
            if self.features:
                set.add(made.attributes, f'"target-features"="{self.features}"')  # llvmlite has no list of such ones
            builder = Builder(made.append_basic_block())
            self.body(builder, made.args)
            builder.ret_void()
        return module.globals[self.name]

    def intrinsic(self) -> tuple[Any, Any]:
        """Return the signature of a call, and what generates it, as Numba's `intrinsic` wants them."""

        def generate(context: Any, builder: Builder, _signature: Any, args: Sequence[Value]) -> Value:
            made = self.define(builder.module)
            made.linkage = "internal"
            builder.call(made, args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * self.arguments), generate


# --- numbers and their bits -------------------------------------------------------------------------------------------


@intrinsic
def as_float32(_context: Any, bits: Any) -> Any:
    """Return the float32 whose bit pattern in BF16, FP16 or FP32 is `bits`."""

    def bf16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        word = builder.shl(builder.zext(args[0], WORD), WORD(16))
        return builder.bitcast(word, ir.FloatType())

    def fp16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    def fp32(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(bits), {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]


@intrinsic
def round_like(_context: Any, bits: Any, value: Any) -> Any:
    """Round a finite float32 to the format of `bits`, half to even; the result is a float32."""

    def bf16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(builder.and_(_nearest_bf16(builder, args[1]), WORD(0xFFFF0000)), ir.FloatType())

    def fp16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.fpext(builder.fptrunc(args[1], ir.HalfType()), ir.FloatType())

    def fp32(_c: Any, _b: Builder, _s: Any, args: Any) -> Value:
        return args[1]

    return types.float32(bits, value), {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]


@intrinsic
def rounded_bits(_context: Any, bits: Any, value: Any) -> Any:
    """Round a float32 to the format of `bits`, half to even, and return its bit pattern there; NaN stays NaN."""

    def bf16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        nearest = _nearest_bf16(builder, args[1])
        nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.trunc(builder.lshr(builder.select(nan, WORD(0x7FC00000), nearest), WORD(16)), HALF)

    def fp16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), HALF)

    def fp32(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[1], WORD)

    return bits(bits, value), {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]


def _nearest_bf16(builder: Builder, value: Value) -> Value:
    """Bits of a float32 after rounding; the upper 16 are BF16's, the lower 16 are to be cut off."""
    word = builder.bitcast(value, WORD)
    odd = builder.and_(builder.lshr(word, WORD(16)), WORD(1))
    return builder.add(builder.add(word, WORD(0x7FFF)), odd)


@intrinsic
def float_bits(_context: Any, _value: Any) -> Any:
    """Return the bit pattern of a float32."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[0], WORD)

    return types.uint32(types.float32), generate


@intrinsic
def magnitude_bits(_context: Any, value: Any) -> Any:
    """Return |value| as an integer that orders the same way: LLVM vectorizes the maximum of integers, not of floats."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.and_(builder.bitcast(args[0], WORD), WORD(0x7FFFFFFF))

    return types.uint32(value), generate


# --- addresses and threads --------------------------------------------------------------------------------------------


@intrinsic
def as_pointer(_context: Any, _address: Any) -> Any:
    """Turn an address into a pointer, for `carray`."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.inttoptr(args[0], BYTE.as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(_context: Any, _counter: Any, _count: Any) -> Any:
    """Add `count` to the int64 at the address `counter`, atomically, and return its value from before."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.atomic_rmw("add", pointer(builder, LONG, args[0]), args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def run_threads(_context: Any, _fork: Any, _work: Any, _data: Any, _threads: Any) -> Any:
    """Run `work(data)` on `threads` threads and wait for them; a single one is the caller's own thread."""

    def generate(context: Any, builder: Builder, _s: Any, args: Any) -> Value:
        fork, work, data, threads = args
        void, any_ = ir.VoidType(), BYTE.as_pointer()
        with builder.if_else(builder.icmp_signed(">", threads, long(1))) as (many, one):
            with many:
                parallel = pointer(builder, ir.FunctionType(void, [any_, any_, WORD, WORD]), fork)
                function_, block = builder.inttoptr(work, any_), builder.inttoptr(data, any_)
                builder.call(parallel, [function_, block, builder.trunc(threads, WORD), WORD(0)])
            with one:
                alone = pointer(builder, ir.FunctionType(void, [any_]), work)
                builder.call(alone, [builder.inttoptr(data, any_)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate
