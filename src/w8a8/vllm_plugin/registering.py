"""Decides whether the plugin is for this vLLM and this platform, and says what came of it.

Before that is decided, it imports only names that every version of vLLM has.
"""

import importlib.util
import os

import vllm
from vllm.platforms import current_platform

from w8a8.vllm_plugin.platform import architecture, interpreted
from w8a8.vllm_plugin.rule import NAMES, OURS, StepAside, aiter_asked_for, chosen, goes_first, known


def add_kernel() -> str:
    """Make vLLM consider our kernel for INT8 layers, and return what came of it, for the log. May be called again.

    Raises `StepAside`.
    """
    # 1) Step aside from a vLLM, an environment or a platform that the kernel is not for.
    if not known(vllm.__version__):
        raise StepAside(f"this w8a8 knows vLLM 0.32, and this is vLLM {vllm.__version__}; a newer w8a8 may know it")
    if importlib.util.find_spec("triton") is None:
        raise StepAside("Triton is not installed")
    if not (current_platform.is_cuda_alike() or interpreted()):
        return "has no kernel for this platform"

    # 2) Register the kernel where the rule puts it.
    from w8a8.vllm_plugin.placing import insert

    if interpreted():
        insert(first=True)
        return "active; INT8 layers run its kernel in Triton's interpreter"
    from w8a8.kernels.gpu.tiles import faster

    arch = architecture()
    measured_faster = faster(arch)
    insert(first=goes_first(arch, faster=measured_faster))

    # 3) Say which kernel INT8 layers will run.
    if not arch:
        return "registered; this process sees no GPU"
    kernel = chosen(arch, ours=True, with_aiter=aiter_asked_for(arch, os.environ), faster=measured_faster)
    otherwise = "" if kernel == OURS else f", or {NAMES[OURS]} with --linear-backend triton"
    return f"active; INT8 layers run {NAMES[kernel]}{otherwise}"
