"""Targets: their occupancy, and which there are."""

import pytest

from w8a8.bench.compiled import bench
from w8a8.bench.targets import Machine, machine
from w8a8.errors import UsageError

pytestmark = pytest.mark.slow


def test_occupancy_is_what_registers_and_shared_memory_allow() -> None:
    rdna: Machine = machine("gfx1100")
    assert rdna.occupancy(registers=96, shared=0, warps=4) == 16
    assert rdna.occupancy(registers=239, shared=0, warps=4) == 6
    assert rdna.occupancy(registers=97, shared=48 << 10, warps=4) == 2
    assert machine("sm_90").occupancy(registers=128, shared=96 << 10, warps=4) == 2


def test_an_architecture_without_kernels_is_refused() -> None:
    for name in ("gfx1030", "sm_75", "x86", "", "sm_90; rm"):
        with pytest.raises(UsageError, match="no INT8 kernels"):
            bench([name])
