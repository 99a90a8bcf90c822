import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from w8a8.formats.arithmetic import Float32s, bf16_bits, encode, round_to

FINITE = arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def bf16(bits: int) -> float:
    return float(np.array([bits << 16], np.uint32).view(np.float32)[0])


@given(FINITE)
def test_bf16_bits_are_the_nearest_and_of_two_as_near_the_even_one(values: Float32s) -> None:
    for value, bits in zip(values.astype(np.float64), bf16_bits(values).tolist(), strict=True):
        low = int(np.array([abs(value)], np.float32).view(np.uint32)[0]) >> 16  # rounded towards zero
        below, above = bf16(low), bf16(low + 1) if low < 0x7F7F else 2.0**128
        middle = (below + above) / 2
        up = abs(value) > middle or (abs(value) == middle and low % 2 == 1)
        assert bits & 0x7FFF == low + up
        assert bits >> 15 == np.signbit(value)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_twice_changes_nothing_and_infinity_stays(dtype: str) -> None:
    values = np.array([0, -0.0, 1e-45, 1e-8, 1 / 3, 65504, 3.4e38, np.inf, -np.inf], np.float32)
    once = round_to(values, dtype)
    np.testing.assert_array_equal(round_to(once, dtype), once)
    assert once[-2:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("BF16", "803f 20c0"), ("F16", "003c 00c1"), ("F32", "0000803f 000020c0")],
)
def test_encode_writes_little_endian(dtype: str, expected: str) -> None:
    assert encode(np.array([1, -2.5], np.float32), dtype) == bytes.fromhex(expected)
