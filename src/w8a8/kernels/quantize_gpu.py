"""Quantizing activations on a GPU, in Triton: one scale per token, symmetric INT8; alone or behind norm or activation.

    amax  = max(|x|, FLOOR)                    FP32
    codes = round_half_even(x * (127 / amax))
    scale = amax / 127

with divisions rounded as IEEE says. A token that holds NaN or infinity has codes of 0 and a scale of NaN.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOOR = tl.constexpr(2.0**-119)
_ROUND = tl.constexpr(1.5 * 2**23)
"""Added to a number below 2**22 in FP32 it leaves no room for a fraction: the sum is rounded, half to even."""


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scales f32 [M, 1] of `x` [M, K] in BF16, FP16 or FP32."""
    m, k = x.shape
    x = x.contiguous()
    codes = torch.empty(m, k, dtype=torch.int8, device=x.device)
    scales = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        _quantize_kernel[(m,)](
            x, codes, scales, k, BLOCK=triton.next_power_of_2(k), num_warps=8, enable_fp_fusion=False
        )
    return codes, scales


@triton.jit
def _quantize(x, codes_ptr, scale_ptr, offsets, mask):
    """One token's values, FP32 in registers, to its codes and its scale."""
    top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = tl.maximum(top.to(tl.float32, bitcast=True), _FLOOR)
    finite = top < 0x7F800000
    codes = (x * tl.div_rn(127.0, amax) + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    tl.store(codes_ptr + offsets, tl.where(finite, codes, 0), mask=mask)
    tl.store(scale_ptr, tl.where(finite, tl.div_rn(amax, 127.0), float("nan")))


@triton.jit
def _quantize_kernel(x_ptr, codes_ptr, scales_ptr, k, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < k
    first = token.to(tl.int64) * k
    x = tl.load(x_ptr + first + offsets, mask=mask, other=0).to(tl.float32)
    _quantize(x, codes_ptr + first, scales_ptr + token, offsets, mask)
