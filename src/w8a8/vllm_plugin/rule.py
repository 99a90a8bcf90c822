"""Which INT8 kernel vLLM runs: its own order of preference, and the place of our kernel in it.

Pure, without torch or vLLM: by these rules the plugin places its kernel, and `w8a8 serve` says which kernel will run.
The order is that of vLLM 0.32 (`_POSSIBLE_INT8_KERNELS` and `choose_scaled_mm_linear_kernel`).

Ours stands before vLLM's own Triton kernel. So it runs on AMD's GPUs unless AITER is switched on, and on others with
`--linear-backend triton`. It stands before all kernels on NVIDIA GPUs where CUTLASS claims INT8 layers but cannot run
them (from Blackwell on, vLLM issue 54311), and where a tuning on this machine found it faster than CUTLASS;
`--linear-backend cutlass` brings CUTLASS back there.
"""

import re
from collections.abc import Mapping

SWITCH = "W8A8_VLLM_PLUGIN"
"""The environment variable that switches the plugin off when it is 0."""

OURS_BEGINS = 80
"""The lowest compute capability (10 times major plus minor) of NVIDIA GPUs that Triton compiles for."""

CUTLASS_ENDS = 100
"""The compute capability from which on vLLM's build of CUTLASS has no INT8."""

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
    """The plugin leaves vLLM alone; the message says why."""


def known(version: str) -> bool:
    """Whether `version` is a release of vLLM that the plugin was written for: 0.32.x, built for any platform."""
    return _KNOWN.fullmatch(version) is not None


def cutlass_fails(arch: str) -> bool:
    """Whether vLLM's CUTLASS claims INT8 layers on `arch` (like `sm_120`), but cannot run them."""
    return _capability(arch) >= CUTLASS_ENDS


def goes_first(arch: str, *, faster: bool) -> bool:
    """Whether our kernel stands before all of vLLM's on `arch`; `faster`: whether it was measured to be."""
    return cutlass_fails(arch) or (faster and _capability(arch) >= OURS_BEGINS)


def aiter_asked_for(arch: str, environment: Mapping[str, str]) -> bool:
    """Whether vLLM takes AITER's kernel if that is installed: on the Instinct line, if its variables say so."""
    values = (environment.get("VLLM_ROCM_USE_AITER", "0"), environment.get("VLLM_ROCM_USE_AITER_LINEAR", "1"))
    return arch.startswith(("gfx94", "gfx95")) and all(value.lower() in ("1", "true") for value in values)


def chosen(arch: str, *, ours: bool, backend: str = "auto", with_aiter: bool = False, faster: bool = False) -> str:
    """Return the kernel that vLLM chooses on a GPU of `arch`: a key of `NAMES`.

    `ours`: whether the plugin is active; `backend`: vLLM's `--linear-backend`; `with_aiter`: whether AITER's kernel is
    asked for; `faster`: whether ours was measured to be faster than vLLM's choice.
    """
    order = [AITER, TRITON] if with_aiter else [TRITON] if arch.startswith("gfx") else [CUTLASS, TRITON, HUMMING]
    if ours and not 0 < _capability(arch) < OURS_BEGINS:
        order.insert(0 if goes_first(arch, faster=faster) else order.index(TRITON), OURS)
    wanted = [kernel for kernel in order if backend == (TRITON if kernel == OURS else kernel)]
    return (wanted or order)[0]


def _capability(arch: str) -> int:
    """Return the compute capability of `sm_90`: 90; 0 for architectures that are not NVIDIA's."""
    match = re.fullmatch(r"sm_(\d+)a?", arch)
    return int(match[1]) if match else 0
