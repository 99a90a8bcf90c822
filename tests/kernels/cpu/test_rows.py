"""The kernels against plain NumPy, bit for bit, on rows chosen to be awkward."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from w8a8.formats.arithmetic import EXACT, bf16_bits, round_to
from w8a8.kernels.cpu.bits import BITS, Bits
from w8a8.kernels.cpu.rows import row_amax, row_codes, row_error

Float32s = NDArray[np.float32]

LARGEST = {"BF16": np.float32(3.3895314e38), "F16": np.float32(65504), "F32": np.finfo(np.float32).max}
DTYPES = st.sampled_from(sorted(BITS))
SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 70))


def to_bits(values: Float32s, dtype: str) -> Bits:
    """The bit patterns of float32 `values`, rounded to `dtype`."""
    if dtype == "BF16":
        return bf16_bits(values).reshape(values.shape)
    with np.errstate(over="ignore"):
        return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).view(BITS[dtype])


def to_float32(bits: Bits) -> Float32s:
    if bits.dtype == np.uint16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if bits.dtype == np.int16 else bits.view(np.float32)


@st.composite
def weights(draw: st.DrawFn, dtype: str) -> Bits:
    """Finite rows [rows, columns]: normal at any magnitude, raw bit patterns, halfway points, zeros, subnormals."""
    rows, columns = draw(SHAPES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return np.concatenate([draw(row(dtype, columns, rng)) for _ in range(rows)])


@st.composite
def row(draw: st.DrawFn, dtype: str, columns: int, rng: np.random.Generator) -> Bits:
    values: NDArray[Any]
    kind = draw(st.sampled_from(["normal", "patterns", "ties", "zeros", "subnormal", "largest"]))
    if kind == "patterns":
        size = BITS[dtype].itemsize
        bits = np.frombuffer(rng.bytes(columns * size), BITS[dtype]).reshape(1, columns)
        return np.where(np.isfinite(to_float32(bits)), bits, BITS[dtype].type(0))
    if kind == "ties":  # halves of a unit, and a largest weight that makes the unit the scale
        unit = draw(st.sampled_from([1.0, rng.uniform(1, 2)])) * 2.0 ** draw(st.integers(-14, 8))
        values = rng.integers(-253, 254, columns) / 2 * unit
        values[0] = 127 * unit
    elif kind == "zeros":
        values = rng.choice([0.0, -0.0], columns)
    elif kind == "subnormal":
        smallest = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}[dtype]
        values = rng.integers(-300, 301, columns) * smallest
    elif kind == "largest":
        values = rng.uniform(-1, 1, columns) * LARGEST[dtype]
        values[rng.integers(columns)] = LARGEST[dtype] * draw(st.sampled_from([1, 1 - 2.0**-24, 1 - 3 * 2.0**-24]))
    else:
        values = rng.standard_normal(columns) * 10.0 ** draw(st.integers(-45, 38))
    limit = float(LARGEST[dtype])
    return to_bits(np.clip(values, -limit, limit).astype(np.float32)[None], dtype)


@st.composite
def any_weights(draw: st.DrawFn) -> tuple[str, Bits]:
    dtype = draw(DTYPES)
    return dtype, draw(weights(dtype))


def reference_codes(w: Float32s, scale: Float32s, dtype: str, quotient: str, low: int) -> NDArray[np.int8]:
    with np.errstate(over="ignore"):
        q = w * (np.float32(1) / scale)[:, None] if quotient == "reciprocal" else w / scale[:, None]
        if quotient == "divide-rounded":
            q = round_to(q, dtype)
    return np.clip(np.rint(q), low, 127).astype(np.int8)


def codes_of(bits: Bits, scale: Float32s, quotient: str = "divide", low: int = -127) -> NDArray[np.int8]:
    out = np.empty(bits.shape, np.int8)
    row_codes(bits, scale, out, quotient, low)
    return out


@given(any_weights())
def test_row_amax_is_the_largest_magnitude_exactly(sample: tuple[str, Bits]) -> None:
    _, bits = sample
    amax = row_amax(bits)
    assert amax.dtype == np.float32
    np.testing.assert_array_equal(amax, np.abs(to_float32(bits)).max(axis=1))


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("columns", [1, 3, 64, 1000])
def test_row_amax_shows_infinity_and_nan_wherever_they_stand(dtype: str, columns: int) -> None:
    for position in {0, columns // 2, columns - 1}:
        values = np.tile(np.linspace(-9, 9, columns, dtype=np.float32), (5, 1))
        values[1:, position] = [np.inf, -np.inf, np.nan, -np.nan]
        bits = to_bits(values, dtype)
        if dtype == "BF16":  # bf16_bits is for numbers
            bits[3:, position] = [0x7FC0, 0xFF81]
        amax = row_amax(bits)
        assert np.isfinite(amax[0])
        assert np.isposinf(amax[1:3]).all()
        assert np.isnan(amax[3:]).all()


@pytest.mark.parametrize("quotient", ["divide", "reciprocal", "divide-rounded"])
@given(data=st.data())
def test_row_codes_are_numpys_float32_codes_bit_for_bit(quotient: str, data: st.DataObject) -> None:
    dtype, bits = data.draw(any_weights())
    w = to_float32(bits)
    low = data.draw(st.sampled_from([-127, -128]))
    stretch = np.float32(data.draw(st.sampled_from([1.0, 1.00393700787, 1.5, 0.37])))
    scale = np.maximum(EXACT.scales(np.abs(w).max(axis=1), dtype) / stretch, np.float32(2.0**-126))
    np.testing.assert_array_equal(
        codes_of(bits, scale, quotient, low), reference_codes(w, scale, dtype, quotient, low), strict=True
    )


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_halfway_quotients_round_to_even_codes(dtype: str) -> None:
    halves = np.arange(-253, 254, 2, dtype=np.float32)[None] / np.float32(2)  # -126.5, -125.5, ... 126.5
    codes = codes_of(to_bits(halves * np.float32(0.25), dtype), np.array([0.25], np.float32))
    assert (codes % 2 == 0).all()
    assert (np.abs(codes - halves) == 0.5).all()


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_codes_stop_at_the_limits_asked_for(dtype: str) -> None:
    bits = to_bits(np.array([[-3.0, -1.0, 0.0, 1.0, 3.0]], np.float32), dtype)
    scale = np.array([1 / 128], np.float32)
    assert codes_of(bits, scale).tolist() == [[-127, -127, 0, 127, 127]]
    assert codes_of(bits, scale, low=-128).tolist() == [[-128, -128, 0, 127, 127]]


@settings(max_examples=400)
@given(any_weights())
def test_our_scales_bring_every_finite_weight_back_within_half_a_scale(sample: tuple[str, Bits]) -> None:
    dtype, bits = sample
    w = to_float32(bits)
    amax = row_amax(bits)
    scale = EXACT.scales(amax, dtype)
    codes = codes_of(bits, scale, EXACT.quotient, EXACT.low)
    assert codes.min() >= -127
    restored = codes.astype(np.float32) * scale[:, None]  # as an engine does it, in float32
    assert np.isfinite(restored).all()
    # The quotient and the product are each rounded to float32 once.
    slack = np.abs(w.astype(np.float64)) * 2.0**-23 + 2.0**-149
    assert (np.abs(w.astype(np.float64) - restored) <= 0.5 * scale[:, None].astype(np.float64) + slack).all()


@given(any_weights())
def test_our_scales_are_finite_and_positive_and_let_the_largest_weight_use_the_whole_range(
    sample: tuple[str, Bits],
) -> None:
    dtype, bits = sample
    amax = row_amax(bits)
    scale = EXACT.scales(amax, dtype)
    assert scale.dtype == np.float32
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    top = np.abs(codes_of(bits, scale).astype(int)).max(axis=1)
    normal = scale >= 2.0**-126
    assert (top[normal & (amax > 0)] == 127).all()
    assert (top[amax == 0] == 0).all()


def test_a_row_of_zeros_gets_a_scale_of_one() -> None:
    assert EXACT.scales(np.zeros(2, np.float32), "BF16").tolist() == [1, 1]


def test_127_times_the_scale_of_the_largest_float32_rows_does_not_overflow() -> None:
    amax = np.finfo(np.float32).max - np.arange(4000, dtype=np.float32) * np.float32(2.0**104)
    assert len(np.unique(amax)) == 4000
    scale = EXACT.scales(amax, "F32")
    assert np.isfinite(np.float32(127) * scale).all()
    plain = (amax / np.float32(127)).astype(np.float64)
    assert (127 * plain >= 2.0**128 - 2.0**103).any(), "without care some would have overflowed"
    assert (codes_of(to_bits(amax[:, None], "F32"), scale) == 127).all()


@given(any_weights(), st.floats(0.5, 2))
def test_row_error_is_numpys(sample: tuple[str, Bits], stretch: float) -> None:
    dtype, bits = sample
    w = to_float32(bits)
    scale = EXACT.scales(row_amax(bits), dtype)
    codes = codes_of(bits, scale * np.float32(stretch) if (scale < 1e38).all() else scale)
    with np.errstate(over="ignore"):
        error = w - codes.astype(np.float32) * scale[:, None]
    found = row_error(bits, codes, scale)
    np.testing.assert_allclose(found.signal, (w.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(found.noise, (error.astype(np.float64) ** 2).sum(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(found.worst, np.abs(error).max(axis=1))
    np.testing.assert_array_equal(found.saturated, ((codes == 127) | (codes <= -127)).sum(axis=1))
    np.testing.assert_array_equal(found.nonzero, (codes != 0).sum(axis=1))


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_reading_a_slice_of_rows_gives_the_same_codes_as_reading_all(dtype: str) -> None:
    bits = to_bits(np.random.default_rng(3).standard_normal((7, 65), dtype=np.float32), dtype)
    scale = EXACT.scales(row_amax(bits), dtype)
    whole = codes_of(bits, scale)
    for first in range(7):
        np.testing.assert_array_equal(codes_of(bits[first:], scale[first:]), whole[first:])
