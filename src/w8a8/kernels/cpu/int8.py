"""A whole W8A8 linear layer on a CPU: quantize the tokens, multiply, scale, round. Weights stay as the file has them.

`chosen.py` says which instruction multiplies (`CPU`), `tiles.py` makes the inner loops of it. Where it takes unsigned
times signed bytes, tokens' codes are the signed ones. Weights become unsigned as they are loaded, by flipping
their sign bit: w + 128. This adds 128 * sum(codes) to a token's sums, which is known from the token alone and is
subtracted at the end; INT32 wraps, so the result is exact. Nothing is computed from a weight ahead of time, and no
second copy of a weight is kept.

The weight [out, in] is stored row by row. There are two ways through it:

- *dot*, few tokens: 64 inputs of 3 or 4 rows meet each token, and lanes are summed at a row's end. The weight is read
  once; the next rows are fetched meanwhile, in the order in which they lie in memory. Reading takes all the time: 2
  tokens cost no more than 1.
- *outer*, more tokens: lanes are tokens. Tokens are packed by vectors, a word (4 bytes) of a row is broadcast, and as
  many sums as there are registers for stay in them. An instruction that multiplies several rows with several tokens
  takes the words of as many rows instead. Blocks of 48 rows stay in L2 while up to 512 tokens pass; where
  codes in vectors are 16-bit integers, a block of weights is written as such first. With 512-bit `vpdpbusd` one core
  makes 480 products a nanosecond, where 512 are possible at 4 GHz.

This file starts no threads. `fork` is the address of `GOMP_parallel(function, data, threads, flags)` in the OpenMP
runtime that torch uses: torch's own threads, which spin already, do the work instead of competing with it. Each call
has a counter from which its threads draw blocks of rows, so any number of callers may use any number of threads.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import carray, types

from w8a8.kernels.cpu.chosen import CPU, dot1, dot2, dot4, dot8, outer1, outer2, outer4, transpose
from w8a8.kernels.cpu.ir import as_float32, as_pointer, fetch_add, float_bits, rounded_bits, run_threads
from w8a8.kernels.cpu.jit import c_function, jit
from w8a8.kernels.cpu.tiles import LINE

FLOOR = 2.0**-119
"""The smallest amax a token is scaled by, 1.5e-36: `127 / amax` stays finite and `amax / 127` normal."""

KINDS = ("BF16", "F16", "F32")
"""safetensors' names for the dtypes of tokens and results; a call's `KIND` is an index into these."""

ROWS = 48
"""Rows of the weight that a thread takes at once."""
DOT_TOKENS = 8 * CPU.code
"""Most tokens that the dot tiles multiply; more where the outer tiles write weights as 16-bit integers first."""
SLAB = 512
"""Tokens that pass while a block of the weight stays in L2."""
DEPTH = 4096 // CPU.code**2
"""Inputs in a block of the weight."""

# What Numba compiles may know of the instruction set: numbers.
LANES, CODE, STEP, DOT_SUMS = CPU.lanes, CPU.code, CPU.step, CPU.dot_sums
CODES_TYPE = np.int8 if CODE == 1 else np.int16
DOT_FLIPPED, OUTER_FLIPPED = 128 * CPU.flips, 128 * (CPU.flips and not CPU.grid)
"""What is added to each weight."""
DOT_GROUP, OUTER_GROUP = CPU.dot_tokens, CPU.vectors
"""Most tokens of a dot tile, and most vectors of an outer tile."""
OUTER_ROWS = (0, *(CPU.outer_rows(vectors) for vectors in range(1, OUTER_GROUP + 1)))
"""Rows of an outer tile, by its vectors."""

PARALLEL_TOKENS = 1 << 19
"""Several threads quantize a slab with at least this many values (about 60 us of work). Below, starting them costs
more: on a busy machine, waiting for a thread that is not running takes milliseconds."""
PARALLEL_WEIGHTS = 1 << 19
"""Several threads multiply when weights times (1 + tokens / 8) reach this number (about 50 us of work)."""

# Positions of a call's parameters in the array that every thread reads: addresses, sizes, the counter of blocks taken.
X, WEIGHT, SCALE, BIAS, OUT, CODES, TOKEN_SCALE, OFFSET, M, N, K, WIDTH, KIND, PHASE, COUNTER, BIAS_KIND = range(16)


@jit()
def _by_dot(m, n, k):  # type: ignore[no-untyped-def]
    """Whether the dot tiles multiply: few tokens, or a shape that the outer tiles would read beyond."""
    return m <= DOT_TOKENS or n < ROWS or k % STEP != 0


@jit()
def _quantize_token(x, codes, scale, offset, flipped, t):  # type: ignore[no-untyped-def]
    top = np.uint32(0)
    for j in range(x.shape[0]):
        top = max(top, float_bits(as_float32(x[j])) & np.uint32(0x7FFFFFFF))
    codes[x.shape[0] :] = 0
    if top >= np.uint32(0x7F800000):  # NaN or infinity
        codes[:] = 0
        scale[t] = np.float32(np.nan)
        offset[t] = 0
        return
    amax = max(as_float32(np.uint32(top)), np.float32(FLOOR))
    inverse = np.float32(127) / amax
    total = np.int32(0)
    for j in range(x.shape[0]):
        code = np.int32(np.rint(as_float32(x[j]) * inverse))
        total = np.int32(total + code)
        codes[j] = code
    scale[t] = amax / np.float32(127)
    offset[t] = np.int32(flipped * total)


@jit()
def _quantize_row(p, t, codes):  # type: ignore[no-untyped-def]
    k = p[K]
    flipped = DOT_FLIPPED if _by_dot(p[M], p[N], k) else OUTER_FLIPPED
    scale = carray(as_pointer(p[TOKEN_SCALE]), p[M], np.float32)
    offset = carray(as_pointer(p[OFFSET]), p[M], np.int32)
    if p[KIND] == 0:
        _quantize_token(carray(as_pointer(p[X] + 2 * t * k), k, np.uint16), codes, scale, offset, flipped, t)
    elif p[KIND] == 1:
        _quantize_token(carray(as_pointer(p[X] + 2 * t * k), k, np.int16), codes, scale, offset, flipped, t)
    else:
        _quantize_token(carray(as_pointer(p[X] + 4 * t * k), k, np.uint32), codes, scale, offset, flipped, t)


@jit()
def _read_bias(p, first, bias):  # type: ignore[no-untyped-def]
    """Write the bias of the channels from `first` on as float32."""
    if p[BIAS] == 0:
        return
    if p[BIAS_KIND] == 0:
        half = carray(as_pointer(p[BIAS] + 2 * first), bias.shape[0], np.uint16)
        for j in range(bias.shape[0]):
            bias[j] = as_float32(half[j])
    elif p[BIAS_KIND] == 1:
        fp16 = carray(as_pointer(p[BIAS] + 2 * first), bias.shape[0], np.int16)
        for j in range(bias.shape[0]):
            bias[j] = as_float32(fp16[j])
    else:
        bias[:] = carray(as_pointer(p[BIAS] + 4 * first), bias.shape[0], np.float32)


@jit()
def _finish_row(sums, offset, scale, token_scale, bias, has_bias, out):  # type: ignore[no-untyped-def]
    for j in range(sums.shape[0]):
        y = np.float32(np.int32(sums[j] - offset)) * scale[j] * token_scale
        if has_bias:
            y += bias[j]
        out[j] = rounded_bits(out[j], y)


@jit()
def _finish(p, t, first, sums, bias):  # type: ignore[no-untyped-def]
    """Write results of token `t`, channels from `first` on: its sums scaled, shifted by the bias, and rounded."""
    count = sums.shape[0]
    offset = carray(as_pointer(p[OFFSET]), p[M], np.int32)[t]
    token_scale = carray(as_pointer(p[TOKEN_SCALE]), p[M], np.float32)[t]
    scale = carray(as_pointer(p[SCALE] + 4 * first), count, np.float32)
    has_bias = p[BIAS] != 0
    at = t * p[N] + first
    if p[KIND] == 0:
        out = carray(as_pointer(p[OUT] + 2 * at), count, np.uint16)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out)
    elif p[KIND] == 1:
        out_half = carray(as_pointer(p[OUT] + 2 * at), count, np.int16)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out_half)
    else:
        out_float = carray(as_pointer(p[OUT] + 4 * at), count, np.uint32)
        _finish_row(sums, offset, scale, token_scale, bias, has_bias, out_float)


@jit()
def _dot_group(m):  # type: ignore[no-untyped-def]
    """Tokens of one dot tile, when `m` tokens are multiplied."""
    return 1 if m == 1 else 2 if m == 2 else 4 if m <= 4 else DOT_GROUP


@jit()
def _outer_group(v, vectors):  # type: ignore[no-untyped-def]
    """Vectors in the outer tile that holds vector `v`: the largest tiles first, then a two, a one."""
    return OUTER_GROUP if v < vectors // OUTER_GROUP * OUTER_GROUP else 2 if v < vectors // 2 * 2 else 1


@jit()
def _quantize_rows(p):  # type: ignore[no-untyped-def]
    """Write codes row by row, as the dot tiles read them."""
    while True:
        t = fetch_add(p[COUNTER], 1)
        if t >= p[M]:
            return
        _quantize_row(p, t, carray(as_pointer(p[CODES] + t * p[WIDTH]), p[WIDTH] // CODE, CODES_TYPE))


@jit()
def _quantize_packed(p):  # type: ignore[no-untyped-def]
    """Write codes as the outer tiles read them: a vector of tokens at a time, transposed by words."""
    width = p[WIDTH]
    vectors = -(-p[M] // LANES)
    codes = np.empty((LANES, width // CODE), CODES_TYPE)
    while True:
        v = fetch_add(p[COUNTER], 1)
        if v >= vectors:
            return
        for t in range(LANES):
            if LANES * v + t < p[M]:
                _quantize_row(p, LANES * v + t, codes[t])
            else:
                codes[t] = 0
        group = _outer_group(v, vectors)
        start = v // group * group
        panel = p[CODES] + LANES * start * width + 4 * LANES * (v - start)
        for j in range(0, width, 4 * LANES):
            transpose(codes.ctypes.data + j, width, panel + LANES * group * j, 4 * LANES * group)


@jit()
def _multiply_dot(p):  # type: ignore[no-untyped-def]
    m, n, k, width = p[M], p[N], p[K], p[WIDTH]
    group = _dot_group(m)
    rows = min(4, DOT_SUMS // group)
    sums = np.empty((-(-m // group) * group, ROWS), np.int32)
    bias = np.zeros(ROWS, np.float32)
    first = fetch_add(p[COUNTER], ROWS)
    while first < n:
        # Rows are taken one turn early, so that they can be fetched while those before are multiplied.
        following = fetch_add(p[COUNTER], ROWS)
        count = min(ROWS, n - first)
        for r in range(0, count, rows):
            row, last = p[WEIGHT] + (first + r) * k, n - 1 - first - r
            ahead = k * (rows if r + rows < count else following - first - r)
            for t in range(0, m, group):
                codes, to = p[CODES] + t * width, sums.ctypes.data + 4 * (t * ROWS + r)
                if group == 1:
                    dot1(row, k, last, codes, width, to, 4 * ROWS, ahead)
                elif group == 2:
                    dot2(row, k, last, codes, width, to, 4 * ROWS, ahead)
                elif group == 4:
                    dot4(row, k, last, codes, width, to, 4 * ROWS, ahead)
                else:
                    dot8(row, k, last, codes, width, to, 4 * ROWS, ahead)
        _read_bias(p, first, bias[:count])
        for t in range(m):
            _finish(p, t, first, sums[t, :count], bias)
        first = following


@jit()
def _widen(weight, k, count, out):  # type: ignore[no-untyped-def]
    """Write the first `count` inputs of rows of `k` bytes as 16-bit integers."""
    for r in range(out.shape[0]):
        row = carray(as_pointer(weight + r * k), count, np.int8)
        for j in range(count):
            out[r, j] = row[j]


@jit()
def _multiply_outer(p):  # type: ignore[no-untyped-def]
    m, n, k, width = p[M], p[N], p[K], p[WIDTH]
    vectors = -(-m // LANES)
    sums = np.empty((LANES * vectors, ROWS), np.int32)
    turned = np.empty((LANES, ROWS), np.int32)
    wide = np.empty((ROWS * (CODE - 1), DEPTH), np.int16)
    bias = np.zeros(ROWS, np.float32)
    while True:
        first = fetch_add(p[COUNTER], ROWS)
        if first >= n:
            return
        # 1) The block's sums; the last block begins earlier, so that some rows are computed twice, to the same sums.
        first = min(first, n - ROWS)
        sums[:] = 0
        for depth in range(0, k, DEPTH):
            inputs = min(DEPTH, k - depth)
            weight, stride = p[WEIGHT] + first * k + depth, k
            if CODE == 2:
                _widen(weight, k, inputs, wide)
                weight, stride = np.int64(wide.ctypes.data), 2 * DEPTH
            words = inputs * CODE // 4
            v = 0
            while v < vectors:
                group = _outer_group(v, vectors)
                codes = p[CODES] + LANES * (v * width + group * depth * CODE)
                to = sums.ctypes.data + 4 * LANES * v * ROWS
                for r in range(0, ROWS, OUTER_ROWS[group]):
                    if group == 4:
                        outer4(weight + r * stride, stride, codes, words, to + 16 * LANES * r)
                    elif group == 2:
                        outer2(weight + r * stride, stride, codes, words, to + 8 * LANES * r)
                    else:
                        outer1(weight + r * stride, stride, codes, words, to + 4 * LANES * r)
                v += group
        # 2) Turn them so that a token's sums lie side by side, and finish each token.
        _read_bias(p, first, bias)
        for v in range(vectors):
            group = _outer_group(v, vectors)
            start = v // group * group
            for r in range(0, ROWS, LANES):
                block = sums.ctypes.data + 4 * LANES * (start * ROWS + group * r + v - start)
                transpose(block, 4 * LANES * group, turned.ctypes.data + 4 * r, 4 * ROWS)
            for t in range(min(LANES, m - LANES * v)):
                _finish(p, LANES * v + t, first, turned[t], bias)


def _work(data):  # type: ignore[no-untyped-def]
    """Do one thread's share of a phase: quantizing tokens (0) or multiplying (1)."""
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


@jit()
def _linear(x, weight, scale, bias, out, m, n, k, kind, bias_kind, work, threads, fork):  # type: ignore[no-untyped-def]
    # 1) Buffers for one slab of tokens, and the parameters that every thread reads.
    width = -(-k // LINE) * LINE * CODE
    size = 4 if kind == 2 else 2
    slab = min(m, SLAB)
    codes = np.empty(-(-slab // LANES) * LANES * width, np.int8)
    token_scale = np.empty(slab, np.float32)
    offset = np.empty(slab, np.int32)
    taken = np.zeros(1, np.int64)
    p = np.zeros(16, np.int64)
    p[WEIGHT], p[SCALE], p[BIAS], p[BIAS_KIND] = weight, scale, bias, bias_kind
    p[N], p[K], p[WIDTH], p[KIND] = n, k, width, kind
    p[CODES], p[TOKEN_SCALE], p[OFFSET] = codes.ctypes.data, token_scale.ctypes.data, offset.ctypes.data
    p[COUNTER] = taken.ctypes.data
    for first in range(0, m, SLAB):
        tokens = min(SLAB, m - first)
        p[X], p[OUT], p[M] = x + first * k * size, out + first * n * size, tokens
        # 2) Quantize the slab's tokens.
        p[PHASE], taken[0] = 0, 0
        run_threads(fork, work, p.ctypes.data, threads if tokens * k >= PARALLEL_TOKENS else 1)
        # 3) Multiply them with every row of the weight, and write the results.
        p[PHASE], taken[0] = 1, 0
        run_threads(fork, work, p.ctypes.data, threads if n * k * (8 + tokens) // 8 >= PARALLEL_WEIGHTS else 1)
    return codes.size + token_scale.size + offset.size + taken[0] + p[0]  # keeps them alive till here


@cache
def _work_compiled() -> Any:
    """Compile `_work` to a C function, cached on disk; the first call on a machine takes seconds."""
    return c_function(types.void(types.voidptr), _work)


def linear(
    x: int,
    weight: int,
    scale: int,
    bias: int,
    out: int,
    shape: tuple[int, int, int],
    kind: str,
    *,
    bias_kind: str = "F32",
    threads: int = 1,
    fork: int = 0,
) -> None:
    """Write `(codes @ weight.T) * scale * token_scale + bias` into `out` [tokens, outputs].

    Every array is contiguous and passed by its address, because Numba unpacks five arrays more slowly than a small
    layer is computed: `x` [tokens, inputs] and `out` of `kind` ("BF16", "F16" or "F32"), `weight` int8 [outputs,
    inputs], `scale` float32 [outputs], `bias` of `bias_kind` [outputs] or 0 for none. `shape` is (tokens, outputs,
    inputs); dot products of up to 132,104 inputs fit INT32. Without `fork` (see above) one thread works. The arithmetic
    is that of `w8a8.runtime.linear`, to the bit. Callable from many threads at once; holds no GIL.
    """
    m, n, k = shape
    work = _work_compiled().address
    kinds = KINDS.index(kind), KINDS.index(bias_kind)
    _linear(x, weight, scale, bias, out, m, n, k, *kinds, work, threads if fork else 1, fork)
