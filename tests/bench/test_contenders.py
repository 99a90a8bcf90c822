"""A product's contenders: wrong results are refused, and CUTLASS is a rival only where it works."""

import pytest
import torch

from w8a8.bench import contenders
from w8a8.errors import SelfCheckError


def test_a_result_that_is_off_by_its_last_bit_is_not_timed() -> None:
    expected = torch.randn(3, 16).bfloat16()
    more = torch.cat([expected, torch.zeros(2, 16).bfloat16()])
    contenders.check(more, expected, "ours")
    off = more.clone()
    off[2, 5] *= 1 + 2**-7
    with pytest.raises(SelfCheckError, match="ours result is wrong"):
        contenders.check(off, expected, "ours")
    contenders.check(off, expected, "another's", rtol=2**-6)


def test_cutlass_is_vllms_choice_only_where_it_has_int8() -> None:
    """A tuning that could not time vLLM's own choice must not say that ours is faster than it."""
    assert [arch for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx1100") if contenders.takes_cutlass(arch)] == [
        "sm_80",
        "sm_90",
    ]
