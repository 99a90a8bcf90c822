"""The W8A8 linear layer: INT8 weights, one scale per output channel; INT8 activations, one scale per token.

For a token x [in] and an output channel w [in] with scale s it computes the same as vLLM's kernels
(`csrc/quantization/w8a8/int8/scaled_quant.cu` and the epilogue of its CUTLASS INT8 matmul):

    amax  = max(|x|, FLOOR)                  FP32, whatever the dtype of x
    codes = round_half_even(x * (127 / amax))
    acc   = sum(codes * w)                   INT32, exact
    y     = (acc * s) * (amax / 127) + bias  FP32, in this order; rounded once, to the dtype of x

`FLOOR` keeps `127 / amax` finite and `amax / 127` normal: it replaces vLLM's special case for a token of zeros, and a
token whose values are all subnormal comes out near zero instead of as garbage. A token that holds NaN or infinity
comes out as NaN, all of it, and alone.

The weight stays as stored in the checkpoint, INT8 [out, in] row by row, and no other copy of it is kept. On a CPU one
call of `w8a8.kernels.cpu.int8` does all of the above; on a GPU two Triton kernels of `w8a8.kernels.gpu` do; elsewhere,
and without Triton, torch operators around `torch._int_mm` do.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.kernels.cpu import int8 as int8_cpu
from w8a8.kernels.cpu.int8 import FLOOR

KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""The dtypes of a layer's inputs and outputs, by their names in `int8_cpu`."""

MAX_IN_FEATURES = (2**31 - 1) // (127 * 128)
"""Longer dot products could overflow INT32."""


class W8A8Linear(nn.Module):  # type: ignore[misc]
    """`y = x @ (weight * weight_scale[:, None]).T + bias`, computed in INT8. For inference: it has no gradient.

    Parameters: `weight` int8 [out, in]; `weight_scale` float32 [out], which `.to(dtype)` leaves float32;
    `bias` [out] of `dtype`, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        """Make weights of 0 and scales of 1, to be loaded; `dtype` is the bias's. Raises ValueError for bad sizes."""
        super().__init__()
        if not 0 < in_features <= MAX_IN_FEATURES or out_features < 1:
            raise ValueError(f"no INT8 layer of {in_features} inputs (1 to {MAX_IN_FEATURES}), {out_features} outputs")
        self.in_features = in_features
        self.out_features = out_features
        self.weight = frozen(torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.weight_scale = frozen(torch.ones(out_features, dtype=torch.float32, device=device))
        self.bias = frozen(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map BF16, FP16 or FP32 `x` [..., in] to [..., out] of the same dtype; `bias` [out] in place of the layer's.

        Raises ValueError for other input.
        """
        if x.dtype not in KINDS or x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected [..., {self.in_features}] of {[*KINDS]}, got {[*x.shape]} of {x.dtype}")
        bias = self.bias if bias is None else bias
        if x.device.type == "cpu":
            return fused(x, self.weight, self.weight_scale, bias)
        if x.is_cuda and find_spec("triton"):
            return by_triton(x, self.weight, self.weight_scale, bias)
        return composed(x, self.weight, self.weight_scale, bias)

    def extra_repr(self) -> str:
        """Describe the layer for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move to another device or dtype, but never lose precision of the scales."""
        scale = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = frozen(scale.to(self.weight_scale.device))
        return self


def fused(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the layer on a CPU, by `int8_cpu.linear` on torch's own threads: `x` [..., in] to [..., out]."""
    n, k = weight.shape
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
    if bias is not None:
        bias = bias.contiguous() if bias.dtype in KINDS else bias.float()
    int8_cpu.linear(
        x.data_ptr(),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        (x.numel() // k, n, k),
        KINDS[x.dtype],
        bias_kind="F32" if bias is None else KINDS[bias.dtype],
        threads=torch.get_num_threads(),
        fork=openmp_fork(),
    )
    return y


def by_triton(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the layer on a GPU, by Triton's kernels: `x` [..., in] to [..., out]."""
    from w8a8.kernels.gpu.int8 import scaled_int8_mm
    from w8a8.kernels.gpu.quantize import quantize_per_token

    codes, scale = quantize_per_token(x.detach().reshape(-1, weight.shape[1]))
    y = scaled_int8_mm(codes, weight, scale, weight_scale, bias, x.dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def composed(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the layer with torch operators alone, on any device: `x` [..., in] to [..., out]."""
    codes, scale = quantize_tokens(x.detach().reshape(-1, weight.shape[1]))
    # CUDA's int8 matmul takes more than 16 tokens, and multiples of 8.
    acc = padded_int_mm(codes, weight, tokens=32, multiple=8) if x.is_cuda else padded_int_mm(codes, weight)
    y = acc.float().mul_(weight_scale).mul_(scale)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `x` [tokens, in] per token: codes int8 [tokens, in] and scales float32 [tokens, 1]."""
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp_(min=FLOOR)
    largest = torch.full_like(amax, 127)  # a tensor: torch may turn division by or of a number into something else
    finite = amax.isfinite()
    codes = (x * (largest / amax)).round_().masked_fill_(~finite, 0).to(torch.int8)
    return codes, (amax / largest).masked_fill_(~finite, torch.nan)


def padded_int_mm(codes: Tensor, weight: Tensor, tokens: int = 1, multiple: int = 1) -> Tensor:
    """Multiply `codes` [tokens, in] by `weight` [out, in] to int32 [tokens, out], in shapes `torch._int_mm` takes."""
    m, n = codes.shape[0], weight.shape[0]
    more_in, more_out = -codes.shape[1] % multiple, -n % multiple
    codes = nn.functional.pad(codes, (0, more_in, 0, max(tokens - m, 0)))
    weight = nn.functional.pad(weight, (0, more_in, 0, more_out))
    return torch._int_mm(codes, weight.t())[:m, :n]


def frozen(tensor: Tensor) -> nn.Parameter:
    """Make a parameter for inference, without gradient."""
    return nn.Parameter(tensor, requires_grad=False)


@cache
def openmp_fork() -> int:
    """Find `GOMP_parallel` in the OpenMP runtime that torch is linked with; 0 where it has none by that name."""
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
