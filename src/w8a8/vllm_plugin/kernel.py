"""The linear kernel that vLLM chooses: INT8 W8A8, weights per channel or tensor, activations per token, symmetric.

Weights stay as vLLM's layers load them from the checkpoint, INT8 [out, in], fused and split over GPUs as vLLM does it.
The kernel declines static and asymmetric activations; vLLM's own kernels take them. A token's result never depends on
its batch, so VLLM_BATCH_INVARIANT needs nothing more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels.linear import Int8ScaledMMLinearKernel, Int8ScaledMMLinearLayerConfig
from vllm.model_executor.layers.fusion.quant_activation import (
    QuantizedActivation,
    as_quantized_activation,
    expose_input_quant_key,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.layers.quantization.utils.quant_utils import QuantKey, kInt8DynamicTokenSym
from vllm.model_executor.layers.quantization.utils.w8a8_utils import convert_to_channelwise
from vllm.platforms import current_platform

from w8a8.kernels.gpu.quantize import ONE_PASS
from w8a8.version import __version__
from w8a8.vllm_plugin import operators  # noqa: F401 - defines torch.ops.w8a8
from w8a8.vllm_plugin.platform import interpreted
from w8a8.vllm_plugin.rule import OURS_BEGINS


class W8A8Int8ScaledMMLinearKernel(Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """vLLM's interface of a linear kernel, around `w8a8.kernels`."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether this platform can run it, and if not, why. `compute_capability` defaults to the present GPU's."""
        if current_platform.is_rocm() or interpreted():
            return True, None
        if compute_capability is None and (here := current_platform.get_device_capability()):
            compute_capability = here.to_int()
        if current_platform.is_cuda() and (compute_capability or 0) >= OURS_BEGINS:
            return True, None
        return False, "requires ROCm, or CUDA with compute capability 8.0 or newer"

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether it supports layers with this configuration, and if not, why."""
        if c.is_static_input_scheme:
            return False, "requires dynamic activation scales, one per token"
        if not c.input_symmetric:
            return False, "requires symmetric activations, without zero points"
        return True, None

    def __init__(self, c: Int8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]) -> None:
        super().__init__(c, layer_param_names)
        _tell_compile_cache()

    def input_quant_key(self) -> QuantKey:
        """Return how activations that come already quantized must be: one dynamic INT8 scale per token, symmetric."""
        return kInt8DynamicTokenSym

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make plain parameters: `weight` int8 [out, in] unchanged, `weight_scale` f32 [out, 1], one per channel."""
        weight, scale, *_ = self._get_layer_params(layer)
        if not self.config.is_channelwise:
            scale = convert_to_channelwise(scale, layer.logical_widths)
        weight_name, scale_name, *_ = self.layer_param_names
        replace_parameter(layer, weight_name, nn.Parameter(weight.data, requires_grad=False))
        replace_parameter(layer, scale_name, nn.Parameter(scale.data, requires_grad=False))
        if type(getattr(layer, "quant_method", None)) in _PASSING_ON and weight.shape[1] <= ONE_PASS:
            expose_input_quant_key(layer, self)

    def apply_weights(self, layer: nn.Module, x: Tensor | QuantizedActivation, bias: Tensor | None = None) -> Tensor:
        """Apply the layer to `x` [..., in]: [..., out], of the dtype that `x` has or had before it was quantized."""
        weight, scale, *_ = self._get_layer_params(layer)
        quantized = as_quantized_activation(x, self.input_quant_key())
        data, x_scale, dtype = (x, None, x.dtype) if quantized is None else (x.data, x.scale, x.orig_dtype)
        return torch.ops.w8a8.int8_linear(data, x_scale, weight, scale, bias, dtype)


_PASSING_ON = (QuarkLinearMethod, CompressedTensorsLinearMethod)
"""The layers' methods that pass their input to the kernel unchanged; others may transform it first."""


def silu_and_mul(x: Tensor, linear: LinearBase) -> QuantizedActivation:  # noqa: ARG001 - vLLM's signature of a producer
    """Compute `silu(gate) * up` of `x` [..., gate and up], quantized for a `linear` layer with our kernel."""
    codes, scale = torch.ops.w8a8.silu_and_mul_quantize(x)
    return QuantizedActivation(codes, scale, x.dtype, codes.shape, kInt8DynamicTokenSym)


def _tell_compile_cache() -> None:
    """Keep compiled graphs with this kernel apart from those without it.

    vLLM's cache finds a compiled model by a hash of its configuration and environment, and plugins are no part of it.
    Without this entry, vLLM would load a model that was compiled before the plugin was installed, for other weights.
    """
    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        config.additional_config["w8a8_plugin"] = __version__
