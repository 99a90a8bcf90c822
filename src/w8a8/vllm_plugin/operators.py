"""What the kernel class computes with, as operators of torch.

`torch.compile` sees one node and its fake, which knows shapes and dtypes; a graph capture sees the kernels' launches,
for nothing here depends on what is in a tensor or waits for the device.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from w8a8.kernels.int8_gpu import scaled_int8_mm
from w8a8.kernels.quantize_gpu import quantize_per_token

_LIBRARY = torch.library.Library("w8a8", "FRAGMENT")


def int8_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, batch_invariant: bool) -> Tensor:
    """`x` [..., in] times `weight` int8 [out, in], scaled by `weight_scale` f32 [out, 1]: [..., out] in `x`'s dtype."""
    codes, scale = quantize_per_token(x.reshape(-1, x.shape[-1]))
    y = scaled_int8_mm(codes, weight, scale, weight_scale, bias, x.dtype, batch_invariant=batch_invariant)
    return y.view(*x.shape[:-1], weight.shape[0])


def _int8_linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,  # noqa: ARG001 - the operator's signature
    bias: Tensor | None,  # noqa: ARG001
    batch_invariant: bool,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


direct_register_custom_op("int8_linear", int8_linear, fake_impl=_int8_linear_fake, target_lib=_LIBRARY)
