"""Puts the kernel where it belongs among vLLM's.

Registered by vLLM's public function, which appends it to the kernels of its platform, where it would never be reached.
So it is moved in that list, and joins the set that `--linear-backend triton` selects. These two are all of vLLM's
private state that is touched; both are looked at first, and neither is touched unless both look as they should.
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
    from w8a8.vllm_plugin.kernel import interpreted

    if interpreted():
        _insert(first=True)
        return "active; INT8 layers run its kernel in Triton's interpreter"
    if not current_platform.is_cuda_alike():
        return "has no kernel for this platform"
    arch = _architecture()
    faster = _measured_faster(arch)
    _insert(first=goes_first(arch, faster=faster))
    if not arch:
        return "registered; this process sees no GPU"
    kernel = chosen(arch, ours=True, with_aiter=aiter_asked_for(arch, os.environ), faster=faster)
    otherwise = "" if kernel == OURS else f", or {NAMES[OURS]} with --linear-backend triton"
    return f"active; INT8 layers run {NAMES[kernel]}{otherwise}"


def _insert(*, first: bool) -> None:
    """Register our kernel for this platform, `first` of all or right before vLLM's own Triton kernel."""
    from vllm.model_executor.kernels import linear

    from w8a8.vllm_plugin.kernel import W8A8Int8ScaledMMLinearKernel as Ours

    platform = current_platform._enum
    kernels = linear._POSSIBLE_INT8_KERNELS[platform]
    selected = linear._LINEAR_BACKEND_KERNEL_MAP["triton"]
    theirs = linear.TritonInt8ScaledMMLinearKernel
    if not (isinstance(kernels, list) and isinstance(selected, set) and theirs in selected):
        raise StepAside("vLLM keeps its kernels otherwise than 0.32 did")
    if Ours in kernels:
        return
    place = 0 if first else kernels.index(theirs)
    linear.register_linear_kernel(Ours, platform, "int8")
    kernels.remove(Ours)
    kernels.insert(place, Ours)
    selected.add(Ours)


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
    from w8a8.kernels.tiles import faster

    return faster(arch)
