"""A W8A8 linear layer on a CPU, whole: quantize the tokens, multiply, scale, round; weights as they lie in the file.

The multiplication is `vpdpbusd` (AVX512-VNNI): 64 products of an unsigned and a signed byte, summed by fours into 16
INT32 lanes. Weights become unsigned by flipping their sign bit as they are loaded, w + 128, and what that adds to a
token's sums, 128 * sum(codes), is taken off at the end: INT32 wraps, so it is exact, and it is known from the token
alone. Nothing is precomputed from a weight and no second copy of one is kept.

Two ways through the weight [out, in], which is kept row by row:

- *dot*, up to 8 tokens: 64 bytes of 3 or 4 rows against each token, lanes summed at a row's end. The weight is read
  once, in order and with software prefetch, and that is what its time is: 2 tokens cost no more than 1.
- *outer*, 9 tokens and more: lanes are tokens. Tokens are packed by groups of 16, 4 bytes of a row are broadcast, and
  24 sums stay in registers: 6 rows x 64 tokens, 12 x 32 or 24 x 16. Blocks of 48 rows x 4,096 inputs stay in L2 while
  up to 512 tokens pass. One core reaches 480 of the 512 products a nanosecond it could make at 4 GHz.

Where a CPU has no AVX512-VNNI, `_dp` spells the same step in plain LLVM IR: slower and as exact, which oneDNN's
`torch._int_mm` is not there (its `vpmaddubsw` saturates: silently wrong sums on AVX2 and AVX-512 without VNNI).

Threads are not made here. `fork` is the address of `GOMP_parallel(function, data, threads, flags)` of the OpenMP
runtime that torch uses, so that torch's own, already spinning, threads do the work instead of competing with it. Any
number of them, started by any number of callers at once, draw blocks of rows from a counter of the call's own.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba import carray, types
from numba.core import cgutils

from w8a8.kernels.cpu.rows import _as_float32, _intrinsic, _jit

FLOOR = 2.0**-119
"""The smallest amax a token is scaled by, 1.5e-36: `127 / amax` stays finite and `amax / 127` normal."""

KINDS = ("BF16", "F16", "F32")
"""What tokens and results are; `linear` takes the index."""

ROWS = 48
"""Rows of the weight that a thread takes at once."""
DOT_TOKENS = 8
SLAB = 512
"""Tokens that pass while a block of the weight stays in L2."""
DEPTH = 4096
"""Inputs of such a block."""
AHEAD = 1024
"""Bytes to prefetch ahead."""
PARALLEL_TOKENS = 1 << 19
"""Values of tokens from which on threads share in quantizing them (some 60 us; where others work too, waiting for
a thread that is not running costs milliseconds)."""
PARALLEL_WEIGHTS = 1 << 20
"""Weights, times 1 + tokens / 8, from which on threads share in the product (some 25 us)."""

# A call's parameters, which every thread reads: addresses, sizes, and the counter of blocks already taken.
X, WEIGHT, SCALE, BIAS, OUT, CODES, TOKEN_SCALE, OFFSET, M, N, K, WIDTH, KIND, PHASE, COUNTER = range(15)

_BYTE, _HALF, _WORD, _LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES = ir.VectorType(_BYTE, 64)
_LANES = ir.VectorType(_WORD, 16)
_ZEROS = ir.Constant(_LANES, None)
_SIGNS = ir.Constant(_LANES, [0x80808080] * 16)
_UNDEFINED = ir.Constant(_LANES, ir.Undefined)

Value = Any  # an llvmlite value; llvmlite has no types


# --- LLVM IR: the tiles -------------------------------------------------------------------------------------------


def _long(value: int) -> Value:
    return ir.Constant(_LONG, value)


def _pointer(builder: Builder, type_: ir.Type, *parts: Value) -> Value:
    """The sum of `parts` as a pointer to `type_`."""
    address = parts[0]
    for part in parts[1:]:
        address = builder.add(address, part)
    return builder.inttoptr(address, type_.as_pointer())


def _function(builder: Builder, name: str, result: ir.Type, *arguments: ir.Type) -> Value:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _has_vnni(context: Any) -> bool:
    return "+avx512vnni" in context.codegen().magic_tuple()[2]


def _dp(context: Any, builder: Builder, acc: Value, u: Value, s: Value) -> Value:
    """`acc` + sums by fours of unsigned bytes `u` times signed bytes `s`."""
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
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_WORD, vector.count), None))


def _outlined(name: str, arguments: int, body: Callable[[Any, Builder, Sequence[Value]], None]) -> tuple[Any, Any]:
    """What an intrinsic of so many int64 returns; `body`, in want of every register, is compiled apart from callers."""

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
    """Sums of `rows` rows with `tokens` tokens, lanes along the inputs.

    Arguments: address of the first row; its bytes; index of the last row there is (rows past it are read as it is);
    address of the first token's codes, bytes from one to the next, zeros up to a multiple of 64; address of the first
    sum, bytes from one token's to the next.
    """

    def body(context: Any, builder: Builder, args: Sequence[Value]) -> None:
        weight, k, last, codes, stride, out, out_stride = args
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

        steps = builder.lshr(k, _long(6))
        with cgutils.for_range(builder, steps) as loop:
            step(builder.shl(loop.index, _long(6)), whole)
        done = builder.shl(steps, _long(6))
        with builder.if_then(builder.icmp_signed("<", done, k), likely=False):
            step(done, part)
        add_up = _function(builder, "llvm.vector.reduce.add.v16i32", _WORD, _LANES)
        for t in range(tokens):
            for r in range(rows):
                to = _pointer(builder, _WORD, out, builder.mul(_long(t), out_stride), _long(4 * r))
                builder.store(builder.call(add_up, [builder.load(sums[t][r])]), to)

    @_intrinsic
    def tile(_context: Any, _weight: Any, _k: Any, _last: Any, _codes: Any, _stride: Any, _out: Any, _step: Any) -> Any:
        return _outlined(f"w8a8_dot_{rows}_{tokens}", 7, body)

    return tile


def _outer_tile(rows: int, vectors: int) -> Any:
    """Add the products of `rows` rows and 16 x `vectors` tokens, lanes along the tokens.

    Arguments: address of the first row's first input; bytes of a row; address of the tokens, packed
    [inputs / 4][16 x vectors][4]; inputs / 4; address of the sums, [rows][16 x vectors].
    """

    def body(context: Any, builder: Builder, args: Sequence[Value]) -> None:
        weight, k, tokens, steps, out = args
        places = [_pointer(builder, _LANES, out, _long(64 * i)) for i in range(rows * vectors)]
        sums = [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in places]
        row = [builder.add(weight, builder.mul(_long(r), k)) for r in range(rows)]
        hidden = None
        if _has_vnni(context):  # from LLVM, which would flip signs before broadcasting, in scarcer registers
            hidden = builder.asm(ir.FunctionType(_LANES, [_LANES]), "", "=v,0", [_SIGNS], side_effect=False)
        with cgutils.for_range(builder, steps) as loop:
            panel = builder.mul(loop.index, _long(64 * vectors))
            signed = [
                builder.load(_pointer(builder, _LANES, tokens, panel, _long(64 * v)), align=4) for v in range(vectors)
            ]
            for r in range(rows):
                four = builder.load(_pointer(builder, _WORD, row[r], builder.shl(loop.index, _long(2))), align=1)
                if hidden is not None:
                    unsigned = builder.xor(_splat(builder, four, _LANES), hidden)
                else:
                    unsigned = _splat(builder, builder.xor(four, _WORD(0x80808080)), _LANES)
                for total, token in zip(sums[r * vectors : (r + 1) * vectors], signed, strict=True):
                    builder.store(_dp(context, builder, builder.load(total), unsigned, token), total)
        for total, place in zip(sums, places, strict=True):
            builder.store(builder.load(total), place, align=4)

    @_intrinsic
    def tile(_context: Any, _weight: Any, _k: Any, _tokens: Any, _steps: Any, _out: Any) -> Any:
        return _outlined(f"w8a8_outer_{rows}_{vectors}", 5, body)

    return tile


@_intrinsic
def _transpose(_context: Any, _source: Any, _stride: Any, _target: Any, _target_stride: Any) -> Any:
    """Transpose 16 x 16 words: address and bytes from row to row, of the source and of the target."""

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


_dot1, _dot2, _dot4, _dot8 = _dot_tile(4, 1), _dot_tile(4, 2), _dot_tile(4, 4), _dot_tile(3, 8)
_outer1, _outer2, _outer4 = _outer_tile(24, 1), _outer_tile(12, 2), _outer_tile(6, 4)


# --- LLVM IR: what Numba has no word for --------------------------------------------------------------------------


@_intrinsic
def _at(_context: Any, _address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.inttoptr(args[0], _BYTE.as_pointer())

    return types.voidptr(types.int64), generate


@_intrinsic
def _take(_context: Any, _counter: Any, _count: Any) -> Any:
    """Add `count` to the int64 at an address, atomically; what it was before."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.atomic_rmw("add", _pointer(builder, _LONG, args[0]), args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@_intrinsic
def _fork(_context: Any, _fork: Any, _work: Any, _data: Any, _threads: Any) -> Any:
    """Run `work(data)` on `threads` threads and wait for them, or here where that is one."""

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


@_intrinsic
def _word(_context: Any, _value: Any) -> Any:
    """A float32's bits."""

    def generate(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[0], _WORD)

    return types.uint32(types.float32), generate


@_intrinsic
def _rounded(_context: Any, bits: Any, value: Any) -> Any:
    """A float32 rounded half to even to the format of `bits`, as its bits; NaN stays NaN."""

    def bf16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        word = builder.bitcast(args[1], _WORD)
        odd = builder.and_(builder.lshr(word, _WORD(16)), _WORD(1))
        nearest = builder.add(builder.add(word, _WORD(0x7FFF)), odd)
        nan = builder.fcmp_unordered("uno", args[1], args[1])
        return builder.trunc(builder.lshr(builder.select(nan, _WORD(0x7FC00000), nearest), _WORD(16)), _HALF)

    def fp16(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(builder.fptrunc(args[1], ir.HalfType()), _HALF)

    def fp32(_c: Any, builder: Builder, _s: Any, args: Any) -> Value:
        return builder.bitcast(args[1], _WORD)

    return bits(bits, value), {types.uint16: bf16, types.int16: fp16, types.uint32: fp32}[bits]


# --- Numba: the two phases ----------------------------------------------------------------------------------------


@_jit()
def _quantize_token(x, codes, scale, offset, t):  # type: ignore[no-untyped-def]
    top = np.uint32(0)
    for j in range(x.shape[0]):
        top = max(top, _word(_as_float32(x[j])) & np.uint32(0x7FFFFFFF))
    codes[x.shape[0] :] = 0
    if top >= np.uint32(0x7F800000):  # NaN or infinity
        codes[:] = 0
        scale[t] = np.float32(np.nan)
        offset[t] = 0
        return
    amax = max(_as_float32(np.uint32(top)), np.float32(FLOOR))
    inverse = np.float32(127) / amax
    total = np.int32(0)
    for j in range(x.shape[0]):
        code = np.int32(np.rint(_as_float32(x[j]) * inverse))
        total = np.int32(total + code)
        codes[j] = code
    scale[t] = amax / np.float32(127)
    offset[t] = np.int32(128 * total)


@_jit()
def _quantize_row(p, t, codes):  # type: ignore[no-untyped-def]
    k = p[K]
    scale = carray(_at(p[TOKEN_SCALE]), p[M], np.float32)
    offset = carray(_at(p[OFFSET]), p[M], np.int32)
    if p[KIND] == 0:
        _quantize_token(carray(_at(p[X] + 2 * t * k), k, np.uint16), codes, scale, offset, t)
    elif p[KIND] == 1:
        _quantize_token(carray(_at(p[X] + 2 * t * k), k, np.int16), codes, scale, offset, t)
    else:
        _quantize_token(carray(_at(p[X] + 4 * t * k), k, np.uint32), codes, scale, offset, t)


@_jit()
def _finish_row(sums, offset, scale, token_scale, bias, has_bias, out):  # type: ignore[no-untyped-def]
    for j in range(sums.shape[0]):
        y = np.float32(np.int32(sums[j] - offset)) * scale[j] * token_scale
        if has_bias:
            y += bias[j]
        out[j] = _rounded(out[j], y)


@_jit()
def _finish(p, t, first, sums):  # type: ignore[no-untyped-def]
    """Scale, shift and round the sums of token `t` and the channels from `first` on, into the result."""
    count = sums.shape[0]
    offset = carray(_at(p[OFFSET]), p[M], np.int32)[t]
    token_scale = carray(_at(p[TOKEN_SCALE]), p[M], np.float32)[t]
    scale = carray(_at(p[SCALE] + 4 * first), count, np.float32)
    bias = carray(_at(p[BIAS] + 4 * first), count, np.float32)
    has_bias = p[BIAS] != 0
    at = t * p[N] + first
    if p[KIND] == 0:
        out = carray(_at(p[OUT] + 2 * at), count, np.uint16)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out)
    elif p[KIND] == 1:
        out_half = carray(_at(p[OUT] + 2 * at), count, np.int16)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out_half)
    else:
        out_float = carray(_at(p[OUT] + 4 * at), count, np.uint32)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out_float)


@_jit()
def _by_dot(m, n, k):  # type: ignore[no-untyped-def]
    """Whether the dot tiles do it: few tokens, or a shape the outer tiles would read beyond."""
    return m <= DOT_TOKENS or n < ROWS or k % 4 != 0


@_jit()
def _dot_group(m):  # type: ignore[no-untyped-def]
    """Tokens of a dot tile."""
    return 1 if m == 1 else 2 if m == 2 else 4 if m <= 4 else 8


@_jit()
def _outer_group(v, vectors):  # type: ignore[no-untyped-def]
    """Vectors of 16 tokens in the outer tile that the `v`th of `vectors` belongs to: fours, then a two, then a one."""
    return 4 if v < vectors // 4 * 4 else 2 if v < vectors // 2 * 2 else 1


@_jit()
def _quantize_rows(p):  # type: ignore[no-untyped-def]
    """Codes row by row, as the dot tiles read them."""
    while True:
        t = _take(p[COUNTER], 1)
        if t >= p[M]:
            return
        _quantize_row(p, t, carray(_at(p[CODES] + t * p[WIDTH]), p[WIDTH], np.int8))


@_jit()
def _quantize_packed(p):  # type: ignore[no-untyped-def]
    """Codes as the outer tiles read them: 16 tokens at a time, transposed by words."""
    width = p[WIDTH]
    vectors = -(-p[M] // 16)
    codes = np.empty((16, width), np.int8)
    while True:
        v = _take(p[COUNTER], 1)
        if v >= vectors:
            return
        for t in range(16):
            if 16 * v + t < p[M]:
                _quantize_row(p, 16 * v + t, codes[t])
            else:
                codes[t] = 0
        group = _outer_group(v, vectors)
        start = v // group * group
        panel = p[CODES] + 16 * start * width + 64 * (v - start)
        for j in range(0, width, 64):
            _transpose(codes.ctypes.data + j, width, panel + 16 * group * j, 64 * group)


@_jit()
def _multiply_dot(p):  # type: ignore[no-untyped-def]
    m, n, k, width = p[M], p[N], p[K], p[WIDTH]
    group = _dot_group(m)
    rows = 3 if group == 8 else 4
    sums = np.empty((-(-m // group) * group, ROWS), np.int32)
    while True:
        first = _take(p[COUNTER], ROWS)
        if first >= n:
            return
        count = min(ROWS, n - first)
        for r in range(0, count, rows):
            row, last = p[WEIGHT] + (first + r) * k, n - 1 - first - r
            for t in range(0, m, group):
                codes, to = p[CODES] + t * width, sums.ctypes.data + 4 * (t * ROWS + r)
                if group == 1:
                    _dot1(row, k, last, codes, width, to, 4 * ROWS)
                elif group == 2:
                    _dot2(row, k, last, codes, width, to, 4 * ROWS)
                elif group == 4:
                    _dot4(row, k, last, codes, width, to, 4 * ROWS)
                else:
                    _dot8(row, k, last, codes, width, to, 4 * ROWS)
        for t in range(m):
            _finish(p, t, first, sums[t, :count])


@_jit()
def _multiply_outer(p):  # type: ignore[no-untyped-def]
    m, n, k, width = p[M], p[N], p[K], p[WIDTH]
    vectors = -(-m // 16)
    sums = np.empty((16 * vectors, ROWS), np.int32)
    turned = np.empty((16, ROWS), np.int32)
    while True:
        first = _take(p[COUNTER], ROWS)
        if first >= n:
            return
        first = min(first, n - ROWS)  # the last block begins earlier: some rows are done twice, to the same end
        sums[:] = 0
        for depth in range(0, k, DEPTH):
            steps = min(DEPTH, k - depth) // 4
            v = 0
            while v < vectors:
                group = _outer_group(v, vectors)
                codes = p[CODES] + 16 * v * width + 16 * group * depth
                to = sums.ctypes.data + 64 * v * ROWS
                rows = 24 // group
                for r in range(0, ROWS, rows):
                    block = p[WEIGHT] + (first + r) * k + depth
                    if group == 4:
                        _outer4(block, k, codes, steps, to + 256 * r)
                    elif group == 2:
                        _outer2(block, k, codes, steps, to + 128 * r)
                    else:
                        _outer1(block, k, codes, steps, to + 64 * r)
                v += group
        for v in range(vectors):
            group = _outer_group(v, vectors)
            start = v // group * group
            for r in range(0, ROWS, 16):
                block = sums.ctypes.data + 64 * (start * ROWS + group * r + v - start)
                _transpose(block, 64 * group, turned.ctypes.data + 4 * r, 4 * ROWS)
            for t in range(min(16, m - 16 * v)):
                _finish(p, 16 * v + t, first, turned[t])


def _work(data):  # type: ignore[no-untyped-def]
    """One thread's share of a phase."""
    p = carray(data, 16, np.int64)
    dot = _by_dot(p[M], p[N], p[K])
    if p[PHASE] == 0:
        if dot:
            _quantize_rows(p)
        else:
            _quantize_packed(p)
    elif dot:
        _multiply_dot(p)
    else:
        _multiply_outer(p)


@_jit()
def _linear(x, weight, scale, bias, out, m, n, k, kind, work, threads, fork):  # type: ignore[no-untyped-def]
    width = -(-k // 64) * 64
    size = 4 if kind == 2 else 2
    slab = min(m, SLAB)
    codes = np.empty(-(-slab // 16) * 16 * width, np.int8)
    token_scale = np.empty(slab, np.float32)
    offset = np.empty(slab, np.int32)
    taken = np.zeros(1, np.int64)
    p = np.zeros(16, np.int64)
    p[WEIGHT], p[SCALE], p[BIAS], p[N], p[K], p[WIDTH], p[KIND] = weight, scale, bias, n, k, width, kind
    p[CODES], p[TOKEN_SCALE], p[OFFSET] = codes.ctypes.data, token_scale.ctypes.data, offset.ctypes.data
    p[COUNTER] = taken.ctypes.data
    for first in range(0, m, SLAB):
        tokens = min(SLAB, m - first)
        p[X], p[OUT], p[M] = x + first * k * size, out + first * n * size, tokens
        p[PHASE], taken[0] = 0, 0
        _fork(fork, work, p.ctypes.data, threads if tokens * k >= PARALLEL_TOKENS else 1)
        p[PHASE], taken[0] = 1, 0
        _fork(fork, work, p.ctypes.data, threads if n * k * (8 + tokens) // 8 >= PARALLEL_WEIGHTS else 1)
    return codes.size + token_scale.size + offset.size + taken[0] + p[0]  # keeps them alive till here


@cache
def _work_compiled() -> Any:
    """`_work` as a C function, cached on disk as `_jit` does it; the first call on a machine takes seconds."""
    signature = types.void(types.voidptr)
    try:
        return numba.cfunc(signature, cache=True, error_model="numpy")(_work)
    except RuntimeError:
        return numba.cfunc(signature, error_model="numpy")(_work)


def linear(
    x: int,
    weight: int,
    scale: int,
    bias: int,
    out: int,
    shape: tuple[int, int, int],
    kind: str,
    *,
    threads: int = 1,
    fork: int = 0,
) -> None:
    """Write `(codes @ weight.T) * scale * token_scale + bias` into `out` [tokens, outputs].

    Everything is handed over as the address of a contiguous array, because five arrays take Numba longer to unpack than
    a small layer takes to compute: `x` [tokens, inputs] and `out` of `kind` ("BF16", "F16" or "F32"), `weight` int8
    [outputs, inputs], `scale` float32 [outputs], `bias` float32 [outputs] or 0 for none. `shape` is tokens, outputs,
    inputs; dot products of up to 132,104 inputs fit INT32. More than one of `threads` needs `fork`, see above. The
    arithmetic is that of `w8a8.runtime.linear`, to the bit. Callable from many threads at once; holds no GIL.
    """
    m, n, k = shape
    work = _work_compiled().address
    _linear(x, weight, scale, bias, out, m, n, k, KINDS.index(kind), work, threads if fork else 1, fork)
