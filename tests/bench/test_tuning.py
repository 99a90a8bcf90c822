"""Tuning: the tiles that are tried."""

import pytest

from w8a8.bench.tuning import candidates
from w8a8.kernels.gpu import tiles


@pytest.mark.parametrize("arch", ["gfx1100", "gfx942", "sm_90", "sm_120"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_tuning_tries_the_shipped_tile_and_its_neighbours(arch: str, tokens: int) -> None:
    tried = candidates(arch, tokens, 5376, 21504)
    assert tried[0] == tiles.shipped(arch, tokens, 5376, 21504)
    assert 15 <= len(tried) == len(set(tried)) <= 80
