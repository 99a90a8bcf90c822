"""The kernel for BF16 layers against sums in float64: to the bit where float32 can hold them, else within its bound."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from w8a8.kernels.cpu import bf16 as bf16_cpu
from w8a8.kernels.cpu.bf16 import DEPTH, FEW, GROUP, ROWS, SLAB

pytestmark = pytest.mark.slow

BOUND = 2e-5
"""How far a sum may be off, as a share of the sum of magnitudes, before it is rounded to BF16."""

Floats = NDArray[np.float32]


def rounded(values: NDArray[Any]) -> Floats:
    """The values as float32, rounded to BF16, half to even."""
    word = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((word + 0x7FFF + ((word >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), nearest)


def run(x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
    """The kernel's result, for values that BF16 can hold."""
    halves = [(a.view(np.uint32) >> 16).astype(np.uint16) for a in (x, weight, bias) if a is not None]
    out = np.full((len(x), len(weight)), 77, np.uint16)
    shift = halves[2].ctypes.data if bias is not None else 0
    shape = (len(x), *weight.shape)
    bf16_cpu.linear(halves[0].ctypes.data, halves[1].ctypes.data, shift, out.ctypes.data, shape)
    return (out.astype(np.uint32) << 16).view(np.float32)


def check_exactly(tokens: int, outputs: int, inputs: int, *, seed: int = 0, bias: bool = True) -> None:
    """Small whole numbers, whose sums float32 holds: the result is the float64 one, rounded once."""
    rng = np.random.default_rng(seed)
    x, weight = (rng.integers(-9, 10, (n, inputs)).astype(np.float32) for n in (tokens, outputs))
    shift = rng.integers(-99, 100, outputs).astype(np.float32) if bias else None
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + (0 if shift is None else shift)
    np.testing.assert_array_equal(run(x, weight, shift), rounded(exact))


@settings(max_examples=120, deadline=None)
@given(
    tokens=st.integers(0, 20),
    outputs=st.integers(1, 110),
    inputs=st.integers(1, 200),
    bias=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_has_every_product_once(tokens: int, outputs: int, inputs: int, bias: bool, seed: int) -> None:
    check_exactly(tokens, outputs, inputs, seed=seed, bias=bias)


@pytest.mark.parametrize("tokens", [SLAB - 1, SLAB, SLAB + 2, 2 * SLAB + 1])
def test_any_number_of_tokens_has_too(tokens: int) -> None:
    check_exactly(tokens, ROWS + 5, GROUP + 7)


@pytest.mark.parametrize("inputs", [DEPTH - GROUP, DEPTH, DEPTH + 1, DEPTH + GROUP, 2 * DEPTH + 80])
@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_deep_layers_have_too(tokens: int, inputs: int) -> None:
    check_exactly(tokens, 3 * ROWS + 1, inputs)


@pytest.mark.parametrize("inputs", [1, 640, 3 * DEPTH + 16])
def test_sums_are_as_good_as_float32_can_be(inputs: int) -> None:
    rng = np.random.default_rng(0)
    x, weight = (rounded(rng.standard_normal((n, inputs)) * 10.0 ** rng.integers(-9, 9, (n, 1))) for n in (17, 70))
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    allowed = BOUND * (np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64))
    y = run(x, weight)
    assert (np.abs(y - exact) <= allowed + 2.0**-8 * np.abs(y)).all()
    # What rounding to BF16 hides is seen with a bias that takes away all that BF16 can hold: one token at a time.
    for t in range(len(x)):
        rest = run(x[t : t + 1], weight, -y[t])[0]
        assert (np.abs(y[t] + rest.astype(np.float64) - exact[t]) <= allowed[t] + 2.0**-16 * np.abs(y[t])).all()


def test_a_token_s_result_depends_on_no_other_token() -> None:
    rng = np.random.default_rng(1)
    x, weight = (rounded(rng.standard_normal((n, DEPTH + 100))) for n in (SLAB + 20, 2 * ROWS + 3))
    alone = np.concatenate([run(x[t : t + 1], weight) for t in range(len(x))])
    for tokens in (2, 3, 4, 16, 100, len(x)):
        np.testing.assert_array_equal(run(x[:tokens], weight), alone[:tokens])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 33, 69])  # 69 lies behind the last whole group
@pytest.mark.parametrize("tokens", [1, 5])
def test_nan_and_infinity_reach_what_they_are_part_of(tokens: int, place: int, bad: float) -> None:
    rng = np.random.default_rng(2)
    x, weight = (rounded(rng.standard_normal((n, 70))) for n in (tokens, ROWS + 5))
    x[-1, place] = bad
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    np.testing.assert_array_equal(
        np.where(np.isfinite(y := run(x, weight)), 0, y), np.where(np.isfinite(expected), 0, expected)
    )
    np.testing.assert_array_equal(y[:-1], run(x[:-1], weight))
    x[-1, place] = 1
    clean = run(x, weight)
    weight[ROWS + 3, place] = bad
    y = run(x, weight)
    assert not np.isfinite(y[:, ROWS + 3]).any()
    np.testing.assert_array_equal(np.delete(y, ROWS + 3, 1), np.delete(clean, ROWS + 3, 1))


def test_sums_beyond_float32_are_infinite_and_subnormal_ones_are_kept() -> None:
    huge, tiny = rounded(np.full((1, 64), 3e38)), rounded(np.full((1, 64), 1e-39))
    one = np.ones((1, 64), np.float32)
    assert run(huge, one)[0, 0] == np.inf
    assert run(huge, -one)[0, 0] == -np.inf
    assert run(tiny, one)[0, 0] == rounded(np.array(tiny.astype(np.float64).sum()))


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: check_exactly(1 + 3 * (n % 7), 200, 256, seed=n), range(32)))
