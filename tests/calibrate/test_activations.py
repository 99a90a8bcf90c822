"""The samples of calibration: some choose scales, some judge them."""

from hypothesis import given
from hypothesis import strategies as st

from w8a8.calibrate.activations import held_out


@given(st.integers(2, 100))
def test_some_samples_are_held_out_and_some_are_not(samples: int) -> None:
    apart = held_out(samples)
    assert len(apart) == samples
    assert 1 <= sum(apart) <= max(1, samples // 8)
    assert not apart[0]
