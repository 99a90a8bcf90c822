"""Decides whether the plugin is for this vLLM and this platform, and says what comes of it.

Only what every vLLM has is imported before that is decided.
"""

import importlib.util
import os

import vllm
from vllm.platforms import current_platform

from w8a8.vllm_plugin.rule import NAMES, OURS, StepAside, aiter_asked_for, chosen, goes_first, known


def add_kernel() -> str:
    """Make vLLM consider our kernel for INT8 layers; returns what came of it, for the log. May be called again.

    Raises `StepAside`.
    """
    if not known(vllm.__version__):
        raise StepAside(f"this w8a8 knows vLLM 0.32, and this is vLLM {vllm.__version__}; a newer w8a8 may know it")
    if importlib.util.find_spec("triton") is None:
        raise StepAside("Triton is not installed")
    if not (current_platform.is_cuda_alike() or interpreted()):
        return "has no kernel for this platform"
    from w8a8.vllm_plugin.placing import insert

    if interpreted():
        insert(first=True)
        return "active; INT8 layers run its kernel in Triton's interpreter"
    arch = _architecture()
    faster = _measured_faster(arch)
    insert(first=goes_first(arch, faster=faster))
    if not arch:
        return "registered; this process sees no GPU"
    kernel = chosen(arch, ours=True, with_aiter=aiter_asked_for(arch, os.environ), faster=faster)
    otherwise = "" if kernel == OURS else f", or {NAMES[OURS]} with --linear-backend triton"
    return f"active; INT8 layers run {NAMES[kernel]}{otherwise}"


def interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter, on the CPU: how they are tested without a GPU."""
    return current_platform.is_cpu() and os.environ.get("TRITON_INTERPRET") == "1"


def _architecture() -> str:
    """`sm_90`, or `gfx110` of gfx1100: what vLLM knows without starting the GPU in this process, which may yet fork.

    Empty where no GPU is visible, as in the process that starts Ray's workers.
    """
    capability = current_platform.get_device_capability()
    if capability is None:
        return ""
    prefix = "gfx" if current_platform.is_rocm() else "sm_"
    return f"{prefix}{capability.to_int()}"


def _measured_faster(arch: str) -> bool:
    from w8a8.kernels.gpu.tiles import faster

    return faster(arch)
