"""The CPU kernel against exact integer arithmetic in NumPy, bit for bit; with INT8 instructions and without."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from w8a8.kernels.cpu import int8 as int8_cpu
from w8a8.kernels.cpu.int8 import DEPTH, DOT_TOKENS, FLOOR, ROWS, SLAB

pytestmark = pytest.mark.slow

BITS = {"BF16": np.uint16, "F16": np.int16, "F32": np.uint32}
Bits = NDArray[Any]
Floats = NDArray[np.float32]


def to_bits(values: Floats, kind: str) -> Bits:
    """float32 rounded to `kind`, half to even, as bit patterns."""
    with np.errstate(over="ignore"):
        if kind == "F16":
            return values.astype(np.float16).view(np.int16)
    word = values.view(np.uint32)
    if kind == "F32":
        return word
    rounded = word.astype(np.uint64) + 0x7FFF + ((word >> 16) & 1)
    return np.where(np.isnan(values), 0x7FC0, rounded >> 16).astype(np.uint16)


def to_floats(bits: Bits, kind: str) -> Floats:
    if kind == "F16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << (16 if kind == "BF16" else 0)).view(np.float32)


def reference(x: Bits, weight: NDArray[np.int8], scale: Floats, bias: Floats | None, kind: str) -> Bits:
    """Compute the layer as it is defined: FP32 in the written order, integers without bound."""
    values = to_floats(x, kind)
    amax = np.maximum(np.abs(values).max(axis=1, keepdims=True), np.float32(FLOOR))
    finite = np.isfinite(amax)
    with np.errstate(all="ignore"):
        codes = np.where(finite, np.rint(values * (np.float32(127) / amax)), 0).astype(np.int64)
        token_scale = np.where(finite, amax / np.float32(127), np.float32(np.nan))
        y = (codes @ weight.T.astype(np.int64)).astype(np.float32) * scale * token_scale
        return to_bits(y if bias is None else y + bias, kind)


def run(x: Bits, weight: NDArray[np.int8], scale: Floats, bias: Floats | None, kind: str) -> Bits:
    out = np.full((len(x), len(weight)), 77, x.dtype)
    shape = (len(x), *weight.shape)
    shift = 0 if bias is None else bias.ctypes.data
    int8_cpu.linear(x.ctypes.data, weight.ctypes.data, scale.ctypes.data, shift, out.ctypes.data, shape, kind)
    return out


def case(tokens: int, outputs: int, inputs: int, kind: str, seed: int = 0, *, bias: bool = True) -> Any:
    """Weights, among them -128, and tokens of very different sizes: zeros, ties, subnormals, the largest there are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, inputs), dtype=np.float32)
    largest = 65504 if kind == "F16" else 3.38e38
    for t in range(tokens):
        match (t + seed) % 8:
            case 1:
                x[t] = 0
            case 2:
                x[t] = rng.integers(-254, 255, inputs) / 2  # ties once 127 is among them
                x[t, -1] = 127
            case 3:
                x[t] *= np.float32(1e-40)
            case 4:
                x[t] = rng.uniform(-1, 1, inputs) * largest
            case 5:
                x[t, 0] = 1000
    weight = rng.integers(-128, 128, (outputs, inputs), np.int8)
    scale = rng.uniform(1e-4, 1e-2, outputs).astype(np.float32)
    return to_bits(x, kind), weight, scale, rng.standard_normal(outputs, dtype=np.float32) if bias else None, kind


def check(*args: Any, **options: Any) -> None:
    arrays = case(*args, **options)
    np.testing.assert_array_equal(run(*arrays), reference(*arrays))


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.integers(0, 70),
    outputs=st.integers(1, 100),
    inputs=st.integers(1, 300),
    kind=st.sampled_from(sorted(BITS)),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_equals_the_integer_reference(
    tokens: int, outputs: int, inputs: int, kind: str, bias: bool, seed: int
) -> None:
    check(tokens, outputs, inputs, kind, seed, bias=bias)


@pytest.mark.parametrize("kind", sorted(BITS))
@pytest.mark.parametrize("tokens", [*range(1, DOT_TOKENS + 2), 16, 32, 48, 112, SLAB - 1, SLAB + 3, SLAB + 40])
def test_every_tile_equals_the_integer_reference(tokens: int, kind: str) -> None:
    check(tokens, ROWS + 5, 132, kind)


@pytest.mark.parametrize("inputs", [DEPTH - 4, DEPTH, DEPTH + 4, 2 * DEPTH + 64])
def test_deep_layers_equal_the_integer_reference(inputs: int) -> None:
    check(20, ROWS, inputs, "BF16")


def test_the_largest_sums_do_not_overflow() -> None:
    inputs = 132_104
    x = to_bits(np.ones((17, inputs), np.float32), "F32")
    weight = np.full((ROWS, inputs), -128, np.int8)
    scale = np.ones(ROWS, np.float32)
    for tokens in (1, 17):
        np.testing.assert_array_equal(
            run(x[:tokens], weight, scale, None, "F32"), reference(x[:tokens], weight, scale, None, "F32")
        )


@pytest.mark.parametrize("kind", sorted(BITS))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_token_with_nan_or_infinity_becomes_nan_and_alone(tokens: int, bad: float, kind: str) -> None:
    check_nan(tokens, bad, kind)


def check_nan(tokens: int, bad: float, kind: str) -> None:
    x, weight, scale, bias, _ = case(tokens, 60, 64, kind)
    values = to_floats(x, kind)
    values[-1, 5] = bad
    x = to_bits(values, kind)
    y = run(x, weight, scale, bias, kind)
    assert np.isnan(to_floats(y, kind)[-1]).all()
    np.testing.assert_array_equal(y[:-1], reference(x, weight, scale, bias, kind)[:-1])


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    cases = [case(tokens, 200, 256, "BF16", seed) for seed, tokens in enumerate([1, 3, 17, 64] * 8)]
    with ThreadPoolExecutor(8) as pool:
        for arrays, y in zip(cases, pool.map(lambda arrays: run(*arrays), cases), strict=True):
            np.testing.assert_array_equal(y, reference(*arrays))
