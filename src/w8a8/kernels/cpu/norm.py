"""RMSNorm on a CPU in one pass, with the bits that torch's operators give one after the other.

    r = 1 / sqrt(sum(x * x) / inputs + eps)    float32
    y = (x * r) * weight                       rounded after either product, or once (`ORDERS`)

The sum is in the order of torch's own (`cascade_sum` in `ATen/native/cpu/SumKernel.cpp`): four vectors side by side,
whose sums are put aside every 16 steps, on four levels; then the four, the inputs behind the last vector, the lanes.
"""

import numpy as np
from numba import carray

from w8a8.kernels.cpu.ir import as_float32, as_pointer, round_like, rounded_bits
from w8a8.kernels.cpu.jit import jit

ORDERS = ("rounded twice", "one added", "rounded once")
"""How `y` is made: (x * r), rounded, times the weight (Llama); (x * r) times (1 + weight) (Gemma); times the weight."""

_SIDE, _LEVELS, _STEP = 4, 4, 16

MOST = 1 << 15
"""Numbers from which torch divides the work among threads, and a single row's sum, too."""


@jit()
def _sum(values, lanes, sums):  # type: ignore[no-untyped-def]
    """Add up `values` as torch does with vectors of `lanes` numbers; `sums` [levels, 4 * lanes] is written over."""
    width = _SIDE * lanes
    steps = values.shape[0] // width
    sums[:] = 0
    for i in range(steps):
        for j in range(width):
            sums[0, j] += values[i * width + j]
        done, level = i + 1, 1
        while level < _LEVELS and done % _STEP == 0:
            for j in range(width):
                sums[level, j] += sums[level - 1, j]
                sums[level - 1, j] = 0
            done, level = done // _STEP, level + 1
    for level in range(1, _LEVELS):
        for j in range(width):
            sums[0, j] += sums[level, j]
    vectors = values.shape[0] // lanes
    for i in range(steps * _SIDE, vectors):
        for j in range(lanes):
            sums[0, j] += values[i * lanes + j]
    for side in range(1, _SIDE):
        for j in range(lanes):
            sums[0, j] += sums[0, side * lanes + j]
    total = np.float32(0)
    for i in range(vectors * lanes, values.shape[0]):
        total += values[i]
    for j in range(lanes):
        total += sums[0, j]
    return total


@jit()
def _row(x, weight, r, twice, out):  # type: ignore[no-untyped-def]
    for j in range(x.shape[0]):
        scaled = as_float32(x[j]) * r
        if twice:
            scaled = round_like(x[j], scaled)
        out[j] = rounded_bits(x[j], scaled * weight[j])


@jit()
def _rows(x, weight, eps, order, lanes, out):  # type: ignore[no-untyped-def]
    inputs = x.shape[1]
    sums, squares = np.empty((_LEVELS, _SIDE * lanes), np.float32), np.empty(inputs, np.float32)
    weights = np.empty(inputs, np.float32)
    for j in range(inputs):
        weights[j] = as_float32(weight[j])
    if order == 1:
        for j in range(inputs):
            weights[j] = np.float32(1) + weights[j]
    for t in range(x.shape[0]):
        row = x[t]
        for j in range(inputs):
            squares[j] = as_float32(row[j]) * as_float32(row[j])
        mean = _sum(squares, lanes, sums) / np.float32(inputs)
        r = np.float32(1) / np.sqrt(mean + np.float32(eps))
        _row(row, weights, r, order == 0, out[t])


@jit()
def _norm(x, weight, out, rows, inputs, kind, eps, order, lanes):  # type: ignore[no-untyped-def]
    if kind == 0:
        halves = carray(as_pointer(x), (rows, inputs), np.uint16)
        weights = carray(as_pointer(weight), inputs, np.uint16)
        _rows(halves, weights, eps, order, lanes, carray(as_pointer(out), (rows, inputs), np.uint16))
    else:
        floats = carray(as_pointer(x), (rows, inputs), np.uint32)
        float_weights = carray(as_pointer(weight), inputs, np.uint32)
        _rows(floats, float_weights, eps, order, lanes, carray(as_pointer(out), (rows, inputs), np.uint32))


KINDS = ("BF16", "F32")
"""The dtypes of inputs, weights and outputs."""


def norm(x: int, weight: int, out: int, shape: tuple[int, int], kind: str, eps: float, order: str, lanes: int) -> None:
    """Write RMSNorm of `x` [tokens, inputs] into `out`; `shape` is (tokens, inputs).

    Arrays are contiguous, of `kind`, and passed by their addresses; `weight` [inputs] is applied as `order` says.
    `lanes`: how many float32 the vectors have that torch computes with on this CPU. One thread works: this is for fewer
    than `MOST` numbers.
    """
    _norm(x, weight, out, *shape, KINDS.index(kind), eps, ORDERS.index(order), lanes)
