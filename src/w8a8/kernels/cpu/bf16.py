"""A linear layer in BF16 on a CPU that computes in float32: weights stay as the file has them, and are read once.

    y = sum(x * w) + bias      float32, products and sums fused; rounded once, to BF16

BF16 is the upper half of a float32. A word of memory holds two weights: shifted up it is the even one, without its
lower half the odd one. So two instructions widen two vectors of weights. Tokens are widened beforehand, by groups of 32
inputs, even ones first.

A tile multiplies 4 rows with up to 3 tokens, lanes along the inputs: 12 sums stay in registers, and each of AVX2's
other four has something to do. All tokens pass a block of 1,024 inputs, three at a time. Up to `FEW` tokens a block has
4 rows, and the next 4 are fetched meanwhile, in the order in which they lie in memory: the weight is read once, at the
memory's speed while there are fewer than about 4 tokens. With more tokens multiplying takes all the time; a block has
48 rows and stays in L2, so that three tokens stay in L1.

In every sum lane j adds up the inputs 2j, 2j + 1, 2j + 2 * lanes, ... of a block (evens before odds in each group), the
lanes are added by neighbours, and then the blocks. So a result depends on neither the number of tokens nor that of
threads, but on the CPU's lanes: 16 with AVX-512, else 8. Each sum is off by at most 2e-5 times sum(|x * w|).

Threads are torch's own: `int8.py` says how.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.ir import IRBuilder as Builder
from numba import carray, types
from numba.core import cgutils

from w8a8.kernels.cpu.instructions import features
from w8a8.kernels.cpu.ir import (
    BYTE,
    WORD,
    Tile,
    Value,
    as_float32,
    as_pointer,
    fetch_add,
    function,
    long,
    pointer,
    rounded_bits,
    run_threads,
)
from w8a8.kernels.cpu.jit import c_function, intrinsic, jit

ROWS = 48
"""Most rows of the weight that a thread takes at once."""
DEPTH = 1024
"""Inputs in a block of the weight."""
GROUP = 32
"""Inputs of a step: a cache line of weights."""
TILE_ROWS, TILE_TOKENS = 4, 3
"""Rows and, at most, tokens of a tile."""
LANES = 16 if "avx512f" in features() else 8
"""Numbers in a vector."""
FEW = 32
"""Most tokens that pass 4 rows at a time: their inputs of a block fit into L2."""
SLAB = 256
"""Tokens that are widened at once."""
PARALLEL_TOKENS = 1 << 18
"""Several threads widen a slab with at least this many values (about 60 us of work)."""
PARALLEL_WEIGHTS = 1 << 19
"""Several threads multiply when weights times (1 + tokens / 4) reach this number (about 30 us of work)."""

# Positions of a call's parameters in the array that every thread reads: addresses, sizes, the counter of work taken.
X, WEIGHT, BIAS, OUT, STATES, M, N, K, WIDTH, TAKEN, PHASE, COUNTER = range(12)

_FLOAT = ir.FloatType()


def _tile(tokens: int) -> Any:
    """Make the tile that adds to the sums of 4 rows and `tokens` tokens the products of a block.

    Arguments: address of the first row's first input; bytes from row to row; index of the last row that exists (read
    again in place of rows past it); address of the first token, widened; bytes from token to token; steps of `GROUP`
    inputs; address of the first sum [tokens][ROWS]; bytes from the first input to what is fetched meanwhile.
    """

    def body(builder: Builder, args: Sequence[Value]) -> None:
        weight, row_bytes, last, states, token_bytes, steps, sums, ahead = args
        words, floats = ir.VectorType(WORD, LANES), ir.VectorType(_FLOAT, LANES)
        high, upper = ir.Constant(words, [16] * LANES), ir.Constant(words, [0xFFFF0000] * LANES)
        fma = function(builder, f"llvm.fmuladd.v{LANES}f32", floats, floats, floats, floats)
        prefetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), BYTE.as_pointer(), WORD, WORD, WORD)
        # 1) Sums of zero; the addresses of rows and tokens.
        zero = ir.Constant(floats, None)
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in range(TILE_ROWS)] for _ in range(tokens)]
        row = []
        for r in range(TILE_ROWS):
            index = builder.select(builder.icmp_signed("<", long(r), last), long(r), last)
            row.append(builder.add(weight, builder.mul(index, row_bytes)))
        token = [builder.add(states, builder.mul(long(t), token_bytes)) for t in range(tokens)]
        # 2) Steps of 32 inputs, first the even ones of each vector of words, then the odd ones.
        with cgutils.for_range(builder, steps) as loop:
            at = builder.shl(loop.index, long(6))
            for line in range(TILE_ROWS):
                place = pointer(builder, BYTE, weight, ahead, builder.shl(at, long(2)), long(64 * line))
                builder.call(prefetch, [place, WORD(0), WORD(3), WORD(1)])
            for word in range(0, GROUP // 2, LANES):
                for odd in (0, 1):
                    # Words are read again for the odd ones: kept, they would need registers that sums need.
                    forget = ir.FunctionType(ir.VoidType(), [])
                    builder.asm(forget, "", "~{memory}", [], side_effect=True)
                    places = [pointer(builder, floats, address, at, at, long(64 * odd + 4 * word)) for address in token]
                    x = [builder.load(place, align=4) for place in places]
                    for r, address in enumerate(row):
                        both = builder.load(pointer(builder, words, address, at, long(4 * word)), align=1)
                        w = builder.bitcast(builder.and_(both, upper) if odd else builder.shl(both, high), floats)
                        for t in range(tokens):
                            builder.store(builder.call(fma, [w, x[t], builder.load(totals[t][r])]), totals[t][r])
        # 3) Add up the lanes of a token's sums, those of 4 rows at once, and add them to what is there.
        four = ir.VectorType(_FLOAT, TILE_ROWS)
        for t in range(tokens):
            left = [builder.load(total) for total in totals[t]]
            while len(left) > 1:
                left = [_neighbours(builder, *left[i : i + 2]) for i in range(0, len(left), 2)]
            for _ in range((LANES // TILE_ROWS).bit_length() - 1):
                left = [_neighbours(builder, left[0], left[0])]
            found = builder.shuffle_vector(left[0], left[0], ir.Constant(ir.VectorType(WORD, 4), [0, 1, 2, 3]))
            place = pointer(builder, four, sums, long(4 * ROWS * t))
            builder.store(builder.fadd(builder.load(place, align=4), found), place, align=4)

    made = Tile(f"w8a8_bf16_{tokens}", 8, body)

    @intrinsic
    def tile(
        _context: Any, _weight: Any, _row: Any, _last: Any, _x: Any, _token: Any, _n: Any, _sums: Any, _ahead: Any
    ) -> Any:
        return made.intrinsic()

    return tile


def _neighbours(builder: Builder, a: Any, b: Any) -> Any:
    """Add each two neighbouring lanes of `a`, and then of `b`: a vector of the same length."""
    lanes = a.type.count
    even, odd = (ir.Constant(ir.VectorType(WORD, lanes), [*range(first, 2 * lanes, 2)]) for first in (0, 1))
    return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))


tile1, tile2, tile3 = _tile(1), _tile(2), _tile(3)


@jit()
def _widen_tokens(p):  # type: ignore[no-untyped-def]
    """Write tokens as float32, in groups of 32 inputs, even ones first, with zeros behind the last."""
    k, groups = p[K], p[K] // GROUP
    while True:
        t = fetch_add(p[COUNTER], 1)
        if t >= p[M]:
            return
        x = carray(as_pointer(p[X] + 2 * t * k), k, np.uint16)
        to = carray(as_pointer(p[STATES] + 4 * t * p[WIDTH]), (p[WIDTH] // GROUP, 2, GROUP // 2), np.float32)
        for g in range(groups):
            for j in range(GROUP // 2):
                to[g, 0, j] = as_float32(x[g * GROUP + 2 * j])
                to[g, 1, j] = as_float32(x[g * GROUP + 2 * j + 1])
        to[groups:] = 0
        for i in range(groups * GROUP, k):
            to[groups, i % 2, i % GROUP // 2] = as_float32(x[i])


@jit()
def _multiply_block(p, block, row_bytes, rows, depth, steps, sums, ahead):  # type: ignore[no-untyped-def]
    """Add to the sums at the address `sums` what a block of `rows` rows at the address `block` gives."""
    m, token_bytes = p[M], 4 * p[WIDTH]
    for t in range(0, m, TILE_TOKENS):
        states = p[STATES] + t * token_bytes + 4 * depth
        for r in range(0, rows, TILE_ROWS):
            row, last, to = block + r * row_bytes, rows - 1 - r, sums + 4 * (t * ROWS + r)
            if m - t >= 3:
                tile3(row, row_bytes, last, states, token_bytes, steps, to, ahead)
            elif m - t == 2:
                tile2(row, row_bytes, last, states, token_bytes, steps, to, ahead)
            else:
                tile1(row, row_bytes, last, states, token_bytes, steps, to, ahead)


@jit()
def _multiply(p):  # type: ignore[no-untyped-def]
    m, n, k = p[M], p[N], p[K]
    span = TILE_ROWS if m <= FEW else ROWS
    sums = np.empty((m, ROWS), np.float32)
    tail, rest = np.zeros((ROWS, GROUP), np.uint16), k % GROUP
    first = fetch_add(p[COUNTER], p[TAKEN])
    while first < n:
        # 1) Rows are taken one turn early, so that they can be fetched while those before are multiplied.
        following = fetch_add(p[COUNTER], p[TAKEN])
        rows, start = min(p[TAKEN], n - first), p[WEIGHT] + 2 * first * k
        sums[:] = 0
        for r in range(0, rows, span):
            count, to = min(span, rows - r), sums.ctypes.data + 4 * r
            after = r + span if r + span < rows else following - first
            for depth in range(0, k - rest, DEPTH):
                steps, ahead = min(DEPTH, k - rest - depth) // GROUP, 2 * (after - r) * k + 2 * (TILE_ROWS - 1) * depth
                block = start + 2 * (r * k + depth)
                _multiply_block(p, block, 2 * k, count, depth, steps, to, ahead if m <= FEW else 0)
        # 2) The inputs behind the last group, with zeros up to a whole one.
        if rest:
            for r in range(rows):
                tail[r, :rest] = carray(as_pointer(start + 2 * (r * k + k - rest)), rest, np.uint16)
            _multiply_block(p, tail.ctypes.data, 2 * GROUP, rows, k - rest, 1, sums.ctypes.data, 0)
        # 3) The bias, and rounding.
        bias = carray(as_pointer(p[BIAS] + 2 * first), rows, np.uint16)
        for t in range(m):
            out = carray(as_pointer(p[OUT] + 2 * (t * n + first)), rows, np.uint16)
            for j in range(rows):
                y = sums[t, j]
                if p[BIAS] != 0:
                    y += as_float32(bias[j])
                out[j] = rounded_bits(out[j], y)
        first = following


def _work(data):  # type: ignore[no-untyped-def]
    """Do one thread's share of a phase: widening tokens (0) or multiplying (1)."""
    p = carray(data, 12, np.int64)
    if p[PHASE] == 0:
        _widen_tokens(p)
    else:
        _multiply(p)


@jit()
def _linear(x, weight, bias, out, m, n, k, work, threads, fork):  # type: ignore[no-untyped-def]
    # 1) A place for one slab of tokens, and the parameters that every thread reads.
    width = -(-k // GROUP) * GROUP
    states = np.empty(min(m, SLAB) * width + 16, np.float32)
    taken = np.zeros(1, np.int64)
    p = np.zeros(12, np.int64)
    p[WEIGHT], p[BIAS], p[N], p[K], p[WIDTH] = weight, bias, n, k, width
    p[STATES], p[COUNTER] = (states.ctypes.data + 63) // 64 * 64, taken.ctypes.data
    p[TAKEN] = max(TILE_ROWS, min(ROWS, n // (4 * threads) // TILE_ROWS * TILE_ROWS))
    for first in range(0, m, SLAB):
        tokens = min(SLAB, m - first)
        p[X], p[OUT], p[M] = x + 2 * first * k, out + 2 * first * n, tokens
        # 2) Widen the slab's tokens.
        p[PHASE], taken[0] = 0, 0
        run_threads(fork, work, p.ctypes.data, threads if tokens * k >= PARALLEL_TOKENS else 1)
        # 3) Multiply them with every row of the weight, and write the results.
        p[PHASE], taken[0] = 1, 0
        run_threads(fork, work, p.ctypes.data, threads if n * k * (4 + tokens) // 4 >= PARALLEL_WEIGHTS else 1)
    return states.size + taken[0] + p[0]  # keeps them alive till here


@cache
def _work_compiled() -> Any:
    """Compile `_work` to a C function, cached on disk; the first call on a machine takes seconds."""
    return c_function(types.void(types.voidptr), _work)


def linear(
    x: int, weight: int, bias: int, out: int, shape: tuple[int, int, int], *, threads: int = 1, fork: int = 0
) -> None:
    """Write `x @ weight.T + bias` into `out` [tokens, outputs].

    Every array is BF16, contiguous, and passed by its address: `x` [tokens, inputs], `weight` [outputs, inputs], `bias`
    [outputs] or 0 for none. `shape` is (tokens, outputs, inputs). Without `fork` (see `int8.py`) one thread works.
    Callable from many threads at once; holds no GIL.
    """
    work = _work_compiled().address
    _linear(x, weight, bias, out, *shape, work, threads if fork else 1, fork)
