"""The kernel's computations as operators of torch.

`torch.compile` sees nodes and their fakes, which know shapes and dtypes; a graph capture sees the kernels' launches.
Nothing here depends on a tensor's values or waits for the device.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from w8a8.kernels.gpu import int8 as int8_gpu
from w8a8.kernels.gpu import quantize as quantize_gpu

_LIBRARY = torch.library.Library("w8a8", "FRAGMENT")


def int8_linear(
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply `x` [..., in] by `weight` int8 [out, in] times `weight_scale` f32 [out, 1], one per channel: [..., out].

    `x` is int8 codes with their `x_scale` f32 [tokens, 1]; without `x_scale` it is quantized here, one scale per token.
    """
    codes = x.reshape(-1, x.shape[-1])
    if x_scale is None:
        codes, x_scale = quantize_gpu.quantize_per_token(codes)
    y = int8_gpu.scaled_int8_mm(codes, weight, x_scale, weight_scale, bias, out_dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _int8_linear_fake(
    x: Tensor,
    x_scale: Tensor | None,  # noqa: ARG001 - the operator's signature
    weight: Tensor,
    weight_scale: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    out_dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype)


def silu_and_mul_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `silu(gate) * up` of `x` [..., gate and up]: int8 codes [..., in] and their scales f32 [tokens, 1]."""
    codes, scale = quantize_gpu.silu_and_mul_quantize(x.reshape(-1, x.shape[-1]))
    return codes.view(*x.shape[:-1], x.shape[-1] // 2), scale


def _silu_and_mul_quantize_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(*x.shape[:-1], x.shape[-1] // 2, dtype=torch.int8)
    return codes, x.new_empty(codes.numel() // codes.shape[-1], 1, dtype=torch.float32)


for _operator, _fake in ((int8_linear, _int8_linear_fake), (silu_and_mul_quantize, _silu_and_mul_quantize_fake)):
    direct_register_custom_op(_operator.__name__, _operator, fake_impl=_fake, target_lib=_LIBRARY)
