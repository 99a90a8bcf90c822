"""The GPUs that kernels are compiled for: their limits, and a driver that compiles for them on any machine."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from w8a8.errors import MissingExtraError, UsageError

ARCHITECTURES = ("gfx1100", "gfx1151", "gfx1201", "gfx942", "sm_80", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True, slots=True)
class Machine:
    """The limits of occupancy: registers per SIMD (and how they are given out), shared memory, waves.

    `lanes` of a wave; `registers` per lane that a SIMD has; `granule` in which they are given; `waves` per SIMD at
    most; `shared` bytes of `simds` SIMDs together; `block` bytes that one workgroup may take.
    """

    lanes: int
    registers: int
    granule: int
    waves: int
    shared: int
    simds: int
    block: int

    def occupancy(self, registers: int, shared: int, warps: int) -> int:
        """Return waves per SIMD for workgroups of `warps` waves, `registers` a lane and `shared` bytes a workgroup."""
        by_registers = self.registers // (-(-registers // self.granule) * self.granule)
        groups = self.shared // shared if shared else self.waves * self.simds
        return min(self.waves, by_registers, max(1, groups * warps // self.simds))


_RDNA = Machine(32, 1536, 24, 16, 128 << 10, 4, 64 << 10)  # a workgroup processor: two compute units
_CDNA3 = Machine(64, 512, 8, 8, 64 << 10, 4, 64 << 10)


def _sm(shared: int, warps: int) -> Machine:
    """Describe a streaming multiprocessor with `shared` KiB of shared memory, 1 KiB of it kept from every block."""
    return Machine(32, 512, 8, warps // 4, shared << 10, 4, (shared - 1) << 10)


MACHINES = {
    "gfx11": _RDNA,
    "gfx12": _RDNA,
    "gfx9": _CDNA3,
    "sm_80": _sm(164, 64),
    "sm_8": _sm(100, 48),
    "sm_9": _sm(228, 64),
    "sm_10": _sm(228, 64),
    "sm_12": _sm(100, 48),
}
"""Limits by the beginning of the architecture's name: AMD's ISA guides and LLVM's, NVIDIA's CUDA programming guide."""


def machine(arch: str) -> Machine:
    """Return the limits of `arch`. Raises UsageError for an architecture that these kernels are not made for."""
    for prefix in sorted(MACHINES, key=len, reverse=True):
        if arch.startswith(prefix) and re.fullmatch(r"gfx\d{3}[0-9a-f]?|sm_\d{2,3}", arch):
            return MACHINES[prefix]
    raise UsageError(f"no INT8 kernels for {arch!r}; try one of {', '.join(ARCHITECTURES)}")


def require_triton() -> None:
    """Raise MissingExtraError where torch or Triton is missing."""
    try:
        import torch  # noqa: F401
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"the GPU kernels need torch and triton ({error}): pip install torch triton") from error


@contextmanager
def target(arch: str) -> Iterator[list[Any]]:
    """Within it, launching a Triton kernel compiles it for `arch`; yields the list that collects compiled kernels."""
    from triton import knobs
    from triton.runtime.driver import driver

    pretended = _Driver(arch)
    kernels: list[Any] = []

    def compiled(*, key: Any, fn: Any, **_: Any) -> None:
        kernels.append(fn.jit_function.device_caches[pretended][0][key])

    before = driver._active, knobs.runtime.jit_post_compile_hook
    driver.set_active(pretended)
    knobs.runtime.jit_post_compile_hook = compiled
    try:
        yield kernels
    finally:
        driver._active, knobs.runtime.jit_post_compile_hook = before


class _Driver:
    """Stands in for a GPU's driver. It is its own device, so that every use of it compiles afresh."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        lanes = machine(arch).lanes
        self._target = GPUTarget("hip", arch, lanes) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
        self.utils = self

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self

    def get_current_stream(self, _device: Any) -> int:
        return 0

    def get_device_properties(self, _device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}  # no limit here: `Loop.shared` tells how much a kernel takes

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1 << 20

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None
