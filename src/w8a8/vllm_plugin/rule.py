"""Which INT8 kernel vLLM runs: its own order of preference, and where ours stands in it.

Pure, without torch or vLLM: the plugin places its kernel by these rules, and `w8a8 serve` says by them what will run.
The order is that of vLLM 0.32 (`_POSSIBLE_INT8_KERNELS` and `choose_scaled_mm_linear_kernel`).

Ours stands before vLLM's own Triton kernel, and so runs on AMD's GPUs unless AITER is switched on, and elsewhere where
`--linear-backend triton` asks for it. It stands before everything on NVIDIA GPUs where CUTLASS claims INT8 layers and
cannot run them (from Blackwell on, vLLM issue 54311), and where a tuning on this machine measured it to be faster than
CUTLASS; `--linear-backend cutlass` brings that back there.
"""

import re
from collections.abc import Mapping

SWITCH = "W8A8_VLLM_PLUGIN"
"""The environment variable that switches the plugin off, when it is 0."""

OURS_BEGINS = 80
"""The compute capability (10 times major plus minor) of the first NVIDIA GPUs that Triton compiles for."""

CUTLASS_ENDS = 100
"""The one from which on CUTLASS, as vLLM builds it, has no INT8."""

OURS, CPU, AITER, CUTLASS, TRITON, HUMMING = "w8a8", "cpu", "aiter", "cutlass", "triton", "humming"

NAMES = {
    OURS: "w8a8's Triton kernel",
    CPU: "vLLM's kernel for the CPU",
    AITER: "AITER's kernel",
    CUTLASS: "vLLM's CUTLASS kernel",
    TRITON: "vLLM's Triton kernel",
    HUMMING: "Humming's kernel",
}

_KNOWN = re.compile(r"0\.32\.\d+(\.post\d+)?(\+[\w.]+)?")


class StepAside(Exception):  # noqa: N818 - no error, but a decision
    """Why the plugin leaves vLLM alone."""


def known(version: str) -> bool:
    """Whether `version` is a release of vLLM that the plugin was written for: 0.32.x, built for whatever."""
    return _KNOWN.fullmatch(version) is not None


def cutlass_fails(arch: str) -> bool:
    """Whether vLLM's CUTLASS claims INT8 layers on `arch` (`sm_90`; `gfx1100`) without being able to run them."""
    return _capability(arch) >= CUTLASS_ENDS


def goes_first(arch: str, *, faster: bool) -> bool:
    """Whether our kernel stands before all of vLLM's on `arch`, `faster` or not as measured."""
    return cutlass_fails(arch) or (faster and _capability(arch) >= OURS_BEGINS)


def aiter_asked_for(arch: str, environment: Mapping[str, str]) -> bool:
    """Whether vLLM takes AITER's kernel, where that is installed: on the Instinct line, if its variable says so."""
    values = (environment.get("VLLM_ROCM_USE_AITER", "0"), environment.get("VLLM_ROCM_USE_AITER_LINEAR", "1"))
    return arch.startswith(("gfx94", "gfx95")) and all(value.lower() in ("1", "true") for value in values)


def chosen(arch: str, *, ours: bool, backend: str = "auto", with_aiter: bool = False, faster: bool = False) -> str:
    """The kernel that vLLM chooses on a GPU of `arch`, by its key in `NAMES`.

    `ours`: whether the plugin is active; `backend`: vLLM's `--linear-backend`; `with_aiter`: whether AITER's kernel is
    asked for; `faster`: whether ours was measured to be faster than vLLM's choice.
    """
    order = [AITER, TRITON] if with_aiter else [TRITON] if arch.startswith("gfx") else [CUTLASS, TRITON, HUMMING]
    if ours and not 0 < _capability(arch) < OURS_BEGINS:
        order.insert(0 if goes_first(arch, faster=faster) else order.index(TRITON), OURS)
    wanted = [kernel for kernel in order if backend == (TRITON if kernel == OURS else kernel)]
    return (wanted or order)[0]


def _capability(arch: str) -> int:
    """The compute capability in `sm_90`; 0 for what is not NVIDIA's."""
    match = re.fullmatch(r"sm_(\d+)a?", arch)
    return int(match[1]) if match else 0
