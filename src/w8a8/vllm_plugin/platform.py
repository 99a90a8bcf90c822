"""The platform that this process's vLLM runs on: its GPU's architecture, or Triton's interpreter."""

import os

from vllm.platforms import current_platform


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: how they are tested without a GPU."""
    return current_platform.is_cpu() and os.environ.get("TRITON_INTERPRET") == "1"


def architecture() -> str:
    """Return `sm_90`, or `gfx110` for gfx1100: what vLLM knows without starting the GPU in a process that may yet fork.

    Empty where no GPU is visible, as in the process that starts Ray's workers.
    """
    capability = current_platform.get_device_capability()
    if capability is None:
        return ""
    prefix = "gfx" if current_platform.is_rocm() else "sm_"
    return f"{prefix}{capability.to_int()}"
