"""LLVM IR for everything that Numba cannot say: bit patterns, addresses and threads, the tiles of the INT8 product.

Everything public here is an intrinsic: a function for compiled code that generates its own instructions.

The tiles multiply codes of activations, signed bytes, with weights made unsigned by flipping their sign bit (`int8.py`
tells why). Their step is `vpdpbusd` (AVX512-VNNI): 64 products of an unsigned and a signed byte, summed by fours into
16 INT32 lanes. Where a CPU has no AVX512-VNNI, `_dp` spells the same step in plain LLVM IR: slower and as exact.
oneDNN's `torch._int_mm` is not exact there: its `vpmaddubsw` saturates, which makes silently wrong sums on AVX2, and on
AVX-512 without VNNI.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba import types
from numba.core import cgutils

from w8a8.kernels.cpu.jit import intrinsic

AHEAD = 1024
"""Bytes that the dot tiles prefetch ahead."""

_BYTE, _HALF, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES = ir.VectorType(_BYTE, 64)
_LANES = ir.VectorType(_WORD, 16)
_ZEROS = ir.Constant(_LANES, None)
_SIGNS = ir.Constant(_LANES, [0x80808080] * 16)

Value = Any  # an llvmlite value; llvmlite has no types


def _long(value: int) -> Value:
    return ir.Constant(_LONG, value)


def _pointer(builder: Builder, type_: ir.Type, *parts: Value) -> Value:
    """Return the sum of `parts` as a pointer to `type_`."""
    address = parts[0]
    for part in parts[1:]:
        address = builder.add(address, part)
    return builder.inttoptr(address, type_.as_pointer())


def _function(builder: Builder, name: str, result: ir.Type, *arguments: ir.Type) -> Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


# --- numbers and their bits -------------------------------------------------------------------------------------------


@intrinsic
def as_float32(_context: Any, bits: Any) -> Any:
    """Return the float32 whose bit pattern in BF16, FP16 or FP32 is `bits`."""

    def bf16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        word = builder.shl(builder.zext(args[0], _WORD), _WORD(16))
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
        return builder.bitcast(builder.and_(_nearest_bf16(builder, args[1]), _WORD(0xFFFF0000)), ir.FloatType())

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
        return builder.trunc(builder.lshr(builder.select(nan, _WORD(0x7FC00000), nearest), _WORD(16)), _HALF)

    def fp16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), _HALF)

    def fp32(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[1], _WORD)

    return bits(bits, value), {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]


def _nearest_bf16(builder: Builder, value: Value) -> Value:
    """Bits of a float32 after rounding; the upper 16 are BF16's, the lower 16 are to be cut off."""
    word = builder.bitcast(value, _WORD)
    odd = builder.and_(builder.lshr(word, _WORD(16)), _WORD(1))
    return builder.add(builder.add(word, _WORD(0x7FFF)), odd)


@intrinsic
def float_bits(_context: Any, _value: Any) -> Any:
    """Return the bit pattern of a float32."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[0], _WORD)

    return types.uint32(types.float32), generate


@intrinsic
def magnitude_bits(_context: Any, value: Any) -> Any:
    """Return |value| as an integer that orders the same way: LLVM vectorizes the maximum of integers, not of floats."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.and_(builder.bitcast(args[0], _WORD), _WORD(0x7FFFFFFF))

    return types.uint32(value), generate


# --- addresses and threads --------------------------------------------------------------------------------------------


@intrinsic
def as_pointer(_context: Any, _address: Any) -> Any:
    """Turn an address into a pointer, for `carray`."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.inttoptr(args[0], _BYTE.as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def fetch_add(_context: Any, _counter: Any, _count: Any) -> Any:
    """Add `count` to the int64 at the address `counter`, atomically, and return its value from before."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.atomic_rmw("add", _pointer(builder, _LONG, args[0]), args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def run_threads(_context: Any, _fork: Any, _work: Any, _data: Any, _threads: Any) -> Any:
    """Run `work(data)` on `threads` threads and wait for them; a single one is the caller's own thread."""

    def generate(context: Any, builder: Builder, _s: Any, args: Any) -> Value:
        fork, work, data, threads = args
        void, pointer = ir.VoidType(), _BYTE.as_pointer()
        with builder.if_else(builder.icmp_signed(">", threads, _long(1))) as (many, one):
            with many:
                parallel = _pointer(builder, ir.FunctionType(void, [pointer, pointer, _WORD, _WORD]), fork)
                function, block = builder.inttoptr(work, pointer), builder.inttoptr(data, pointer)
                builder.call(parallel, [function, block, builder.trunc(threads, _WORD), _WORD(0)])
            with one:
                function = _pointer(builder, ir.FunctionType(void, [pointer]), work)
                builder.call(function, [builder.inttoptr(data, pointer)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# --- tiles ------------------------------------------------------------------------------------------------------------


def _has_vnni(context: Any) -> bool:
    """Whether the CPU that is compiled for has AVX512-VNNI."""
    return "+avx512vnni" in context.codegen().magic_tuple()[2]


def _dp(context: Any, builder: Builder, acc: Value, u: Value, s: Value) -> Value:
    """Add to `acc` the products of unsigned bytes `u` and signed bytes `s`, four products to each INT32 lane."""
    if _has_vnni(context):
        vpdpbusd = _function(builder, "llvm.x86.avx512.vpdpbusd.512", _LANES, _LANES, _LANES, _LANES)
        return builder.call(vpdpbusd, [acc, u, s])
    halves, words = ir.VectorType(_HALF, 32), ir.VectorType(_WORD, 32)
    eight = ir.Constant(halves, [8] * 32)
    u, s = builder.bitcast(u, halves), builder.bitcast(s, halves)
    low = builder.and_(u, ir.Constant(halves, [255] * 32)), builder.ashr(builder.shl(s, eight), eight)
    high = builder.lshr(u, eight), builder.ashr(s, eight)
    for a, b in (low, high):
        products = builder.mul(builder.sext(a, words), builder.sext(b, words))
        for first in (0, 1):
            every_other = ir.Constant(_LANES, list(range(first, 32, 2)))
            acc = builder.add(acc, builder.shuffle_vector(products, ir.Constant(words, ir.Undefined), every_other))
    return acc


def _splat(builder: Builder, value: Value, vector: ir.VectorType) -> Value:
    """Broadcast `value` to every lane of a `vector`."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_WORD, vector.count), None))


def _outlined(name: str, arguments: int, body: Callable[[Any, Builder, Sequence[Value]], None]) -> tuple[Any, Any]:
    """Make an intrinsic of int64 `arguments` whose `body` is a function of its own, so that it has every register."""

    def generate(context: Any, builder: Builder, _signature: Any, args: Sequence[Value]) -> Value:
        if name not in builder.module.globals:
            function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_LONG] * arguments), name)
            function.linkage = "internal"
            function.attributes.add("noinline")
            inner = Builder(function.append_basic_block())
            body(context, inner, function.args)
            inner.ret_void()
        builder.call(builder.module.globals[name], args)
        return context.get_dummy_value()

    return types.void(*[types.int64] * arguments), generate


def _dot_tile(rows: int, tokens: int) -> Any:
    """Make the tile that multiplies `rows` rows with `tokens` tokens, lanes along the inputs.

    Arguments: address of the first row; bytes of a row; index of the last row that exists (read again in place of rows
    past it); address of the first token's codes (zeros up to a multiple of 64); bytes from one token's codes to the
    next's; address of the first sum; bytes from one token's sums to the next's.
    """

    def body(context: Any, builder: Builder, args: Sequence[Value]) -> None:
        weight, k, last, codes, stride, out, out_stride = args
        # 1) Sums of zero; the addresses of rows and tokens.
        sums = [[cgutils.alloca_once_value(builder, _ZEROS) for _ in range(rows)] for _ in range(tokens)]
        row = []
        for r in range(rows):
            index = builder.select(builder.icmp_signed("<", _long(r), last), _long(r), last)
            row.append(builder.add(weight, builder.mul(index, k)))
        token = [builder.add(codes, builder.mul(_long(t), stride)) for t in range(tokens)]
        prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), _BYTE.as_pointer(), _WORD, _WORD, _WORD)

        def whole(address: Value, at: Value) -> Value:
            ahead = _pointer(builder, _BYTE, address, at, _long(AHEAD))
            builder.call(prefetch, [ahead, _WORD(0), _WORD(3), _WORD(1)])
            return builder.load(_pointer(builder, _LANES, address, at), align=1)

        def part(address: Value, at: Value) -> Value:
            left = _splat(builder, builder.trunc(builder.sub(k, at), _BYTE), _BYTES)
            mask = builder.icmp_unsigned("<", ir.Constant(_BYTES, list(range(64))), left)
            name = "llvm.masked.load.v64i8.p0"
            load = _function(builder, name, _BYTES, _BYTES.as_pointer(), _WORD, mask.type, _BYTES)
            read = [_pointer(builder, _BYTES, address, at), _WORD(1), mask, ir.Constant(_BYTES, None)]
            return builder.bitcast(builder.call(load, read), _LANES)

        def step(at: Value, load: Callable[[Value, Value], Value]) -> None:
            unsigned = [builder.xor(load(address, at), _SIGNS) for address in row]
            for t in range(tokens):
                signed = builder.load(_pointer(builder, _LANES, token[t], at), align=1)
                for total, w in zip(sums[t], unsigned, strict=True):
                    builder.store(_dp(context, builder, builder.load(total), w, signed), total)

        # 2) Steps of 64 inputs, and one for the rest.
        steps = builder.lshr(k, _long(6))
        with cgutils.for_range(builder, steps) as loop:
            step(builder.shl(loop.index, _long(6)), whole)
        done = builder.shl(steps, _long(6))
        with builder.if_then(builder.icmp_signed("<", done, k), likely=False):
            step(done, part)
        # 3) Add up the lanes of each sum, and write it.
        add_up = _function(builder, "llvm.vector.reduce.add.v16i32", _WORD, _LANES)
        for t in range(tokens):
            for r in range(rows):
                to = _pointer(builder, _WORD, out, builder.mul(_long(t), out_stride), _long(4 * r))
                builder.store(builder.call(add_up, [builder.load(sums[t][r])]), to)

    @intrinsic
    def tile(_context: Any, _weight: Any, _k: Any, _last: Any, _codes: Any, _stride: Any, _out: Any, _step: Any) -> Any:
        return _outlined(f"w8a8_dot_{rows}_{tokens}", 7, body)

    return tile


def _outer_tile(rows: int, vectors: int) -> Any:
    """Make the tile that adds the products of `rows` rows with 16 x `vectors` tokens, lanes along the tokens.

    Arguments: address of the first row's first input; bytes of a row; address of the tokens, packed
    [inputs / 4][16 x vectors][4]; inputs / 4; address of the sums [rows][16 x vectors].
    """

    def body(context: Any, builder: Builder, args: Sequence[Value]) -> None:
        weight, k, tokens, steps, out = args
        # 1) The sums so far, in registers; the addresses of rows.
        places = [_pointer(builder, _LANES, out, _long(64 * i)) for i in range(rows * vectors)]
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
        row = [builder.add(weight, builder.mul(_long(r), k)) for r in range(rows)]
        signs = None
        if _has_vnni(context):
            # Hidden from LLVM by an empty asm: it would flip signs before broadcasting, in registers that are scarcer.
            signs = builder.asm(ir.FunctionType(_LANES, [_LANES]), "", "=v,0", [_SIGNS], side_effect=False)
        # 2) Steps of 4 inputs: each row's 4 bytes, broadcast, against every vector of tokens.
        with cgutils.for_range(builder, steps) as loop:
            panel = builder.mul(loop.index, _long(64 * vectors))
            signed = [
                builder.load(_pointer(builder, _LANES, tokens, panel, _long(64 * v)), align=4) for v in range(vectors)
            ]
            for r in range(rows):
                four = builder.load(_pointer(builder, _WORD, row[r], builder.shl(loop.index, _long(2))), align=1)
                if signs is not None:
                    unsigned = builder.xor(_splat(builder, four, _LANES), signs)
                else:
                    unsigned = _splat(builder, builder.xor(four, _WORD(0x80808080)), _LANES)
                for total, token in zip(sums[r * vectors : (r + 1) * vectors], signed, strict=True):
                    builder.store(_dp(context, builder, builder.load(total), unsigned, token), total)
        # 3) Write the sums back.
        for total, place in zip(sums, places, strict=True):
            builder.store(builder.load(total), place, align=4)

    @intrinsic
    def tile(_context: Any, _weight: Any, _k: Any, _tokens: Any, _steps: Any, _out: Any) -> Any:
        return _outlined(f"w8a8_outer_{rows}_{vectors}", 5, body)

    return tile


@intrinsic
def transpose(_context: Any, _source: Any, _stride: Any, _target: Any, _target_stride: Any) -> Any:
    """Transpose 16 x 16 words; arguments: address and bytes from row to row, of the source and of the target."""

    def body(_context: Any, builder: Builder, args: Sequence[Value]) -> None:
        source, stride, target, target_stride = args
        v = [builder.load(_pointer(builder, _LANES, source, builder.mul(_long(i), stride)), align=1) for i in range(16)]
        for bit in (1, 2, 4, 8):
            low = ir.Constant(_LANES, [16 + j - bit if j & bit else j for j in range(16)])
            high = ir.Constant(_LANES, [16 + j if j & bit else j + bit for j in range(16)])
            v = [builder.shuffle_vector(v[i & ~bit], v[i | bit], high if i & bit else low) for i in range(16)]
        for i in range(16):
            builder.store(v[i], _pointer(builder, _LANES, target, builder.mul(_long(i), target_stride)), align=1)

    return _outlined("w8a8_transpose", 4, body)


dot1, dot2, dot4, dot8 = _dot_tile(4, 1), _dot_tile(4, 2), _dot_tile(4, 4), _dot_tile(3, 8)
outer1, outer2, outer4 = _outer_tile(24, 1), _outer_tile(12, 2), _outer_tile(6, 4)
