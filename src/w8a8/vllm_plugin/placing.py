"""Puts the kernel at its place among vLLM's.

vLLM's public function registers the kernel at the end of its platform's list, where it would never be reached. So three
pieces of vLLM's private state change, and no others: the kernel moves up in that list; it joins the set of kernels that
`--linear-backend triton` selects; and SiLU followed by quantization joins the table of such fused pairs. All three are
checked first, and none changes unless all look as expected.
"""

from vllm.model_executor.kernels import linear
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fusion import fused_act_quant
from vllm.model_executor.layers.quantization.utils.quant_utils import kInt8DynamicTokenSym
from vllm.platforms import current_platform

from w8a8.vllm_plugin.kernel import W8A8Int8ScaledMMLinearKernel as OurKernel
from w8a8.vllm_plugin.kernel import silu_and_mul
from w8a8.vllm_plugin.rule import StepAside


def insert(*, first: bool) -> None:
    """Register our kernel for this platform, `first` of all or right before vLLM's own Triton kernel.

    Does nothing if it is registered already. Raises `StepAside`.
    """
    platform = current_platform._enum
    kernels = linear._POSSIBLE_INT8_KERNELS[platform]
    selected = linear._LINEAR_BACKEND_KERNEL_MAP["triton"]
    fused = fused_act_quant._FUSED_ACT_QUANT
    theirs = linear.TritonInt8ScaledMMLinearKernel
    if not (isinstance(kernels, list) and isinstance(selected, set) and isinstance(fused, dict) and theirs in selected):
        raise StepAside("vLLM keeps its kernels in other lists than 0.32 does")
    if OurKernel in kernels:
        return
    place = 0 if first else kernels.index(theirs)
    linear.register_linear_kernel(OurKernel, platform, "int8")
    kernels.remove(OurKernel)
    kernels.insert(place, OurKernel)
    selected.add(OurKernel)
    fused[SiluAndMul, kInt8DynamicTokenSym] = silu_and_mul
