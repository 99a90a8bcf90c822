"""Quantizing activations on a GPU, in Triton: symmetric INT8, one scale per token; alone or behind a norm or a gate.

    amax  = max(|x|, FLOOR)                    FP32
    codes = round_half_even(x * (127 / amax))
    scale = amax / 127

as in the W8A8 layer (`runtime/linear.py`). These divisions round as IEEE demands, which Triton's `/` does not on every
GPU, and nothing is contracted to fused multiply-adds. A token that holds NaN or infinity has codes of 0 and a scale of
NaN.

A token is read once: a program holds all of it in registers, finds its largest value, and writes its codes. Tokens
longer than `ONE_PASS` are read twice. A token's division into blocks depends on its length alone, so its codes do not
depend on its batch.

The fused kernels compute in FP32, as the modules do, and round to the activations' dtype where the modules round. So
fusing changes the memory traffic only: the result equals that of the module followed by `quantize_per_token`, except
for the order in which squares are summed, and the GPU's `exp`, `erf` and division within the activation.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ONE_PASS = 1 << 15
"""Values of the longest token that is held in registers: 64 a lane, with 16 warps of 32."""

_FLOOR = tl.constexpr(2.0**-119)  # `FLOOR` of `kernels/cpu/int8.py`, which explains it
_ROUND = tl.constexpr(1.5 * 2**23)  # added to a number below 2**22, it leaves no bits for a fraction: half to even
_INFINITY = tl.constexpr(0x7F800000)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `x` [M, K] in BF16, FP16 or FP32 to codes int8 [M, K] and scales float32 [M, 1].

    Raises ValueError for other shapes and dtypes.
    """
    x = _rows(x)
    codes, scales = _results(x, x.shape[1])
    if x.shape[0]:
        block = min(triton.next_power_of_2(x.shape[1]), ONE_PASS)
        _quantize_kernel[(x.shape[0],)](
            x, codes, scales, x.shape[1], x.stride(0), BLOCK=block, ONE=x.shape[1] <= block, **_options(block)
        )
    return codes, scales


Norm = Literal["llama", "gemma3", "gemma4"]
"""`llama`: norm, round, multiply by the weight, round. `gemma4`: norm, multiply, round. `gemma3`: as `gemma4`, with
1 + weight."""


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, *, norm: Norm = "llama", residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize the RMS norm of `x` [M, K] with `weight` [K]: codes and scales like those of `quantize_per_token`.

    With a `residual` [M, K] of x's dtype, x + residual is normed, and overwrites `residual`. K is at most `ONE_PASS`.
    Raises ValueError for a larger K, and for operands that do not fit together.
    """
    x = _rows(x, ONE_PASS)
    m, k = x.shape
    if weight.shape != (k,) or not weight.is_floating_point():
        raise ValueError(f"expected a floating weight [{k}], got {[*weight.shape]} of {weight.dtype}")
    if residual is not None and (
        residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_contiguous()
    ):
        raise ValueError(f"expected a contiguous residual like x, {[m, k]} of {x.dtype}")
    codes, scales = _results(x, k)
    if m:
        block = triton.next_power_of_2(k)
        _rms_norm_kernel[(m,)](
            x,
            residual,
            weight.contiguous(),
            codes,
            scales,
            k,
            x.stride(0),
            eps,
            NORM=norm,
            BLOCK=block,
            **_options(block),
        )
    return codes, scales


def silu_and_mul_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `silu(gate) * up` to codes [M, K] and scales [M, 1]; `x` [M, 2 K] holds gate and up side by side."""
    return _gated(x, "silu")


def gelu_and_mul_quantize(x: Tensor, approximate: Literal["tanh", "none"] = "tanh") -> tuple[Tensor, Tensor]:
    """Quantize `gelu(gate) * up` to codes [M, K] and scales [M, 1]; `x` [M, 2 K] holds gate and up side by side.

    `approximate` is passed on from `torch.nn.functional.gelu`.
    """
    return _gated(x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    x = _rows(x)
    if x.shape[1] % 2:
        raise ValueError(f"expected rows of gate and up side by side, of even length, got {[*x.shape]}")
    k = x.shape[1] // 2
    codes, scales = _results(x, k)
    if x.shape[0]:
        block = min(triton.next_power_of_2(k), ONE_PASS)
        _gated_kernel[(x.shape[0],)](
            x, codes, scales, k, x.stride(0), ACTIVATION=activation, BLOCK=block, ONE=k <= block, **_options(block)
        )
    return codes, scales


def _rows(x: Tensor, longest: int | None = None) -> Tensor:
    """Return `x` with contiguous rows. Raises ValueError unless it is [M, K] of a dtype that can be quantized."""
    if x.dim() != 2 or x.dtype not in DTYPES or not 0 < x.shape[1] <= (longest or x.shape[1]):
        limit = f" with K at most {longest}" if longest else ""
        raise ValueError(f"expected [M, K]{limit} of {[*DTYPES]}, got {[*x.shape]} of {x.dtype}")
    return x if x.stride(1) == 1 else x.contiguous()


def _results(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Allocate codes int8 [M, K] and scales float32 [M, 1] for `x` [M, ...]."""
    return (
        torch.empty(x.shape[0], k, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device),
    )


def _options(block: int) -> dict[str, int]:
    """Compiler options for a block: a warp per 1024 values, 1 to 16 warps; no fused multiply-adds."""
    return {"num_warps": min(max(block // 1024, 1), 16), "enable_fp_fusion": False}


@triton.jit
def _top(x):
    """Return the bits, as FP32 has them, of the largest magnitude: infinity and NaN are above all numbers.

    Bits order like magnitudes. So 16-bit values are compared as they are, and stay two to a register until they become
    codes: half the registers, twice the programs that load while others compute.
    """
    if x.dtype == tl.float32:
        top = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    else:
        narrow = tl.max(x.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int16)
        top = narrow.to(x.dtype, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return top


@triton.jit
def _codes(x, top):
    """Return the INT8 codes of values whose largest magnitude has the FP32 bits `top`."""
    amax = tl.maximum(top.to(tl.float32, bitcast=True), _FLOOR)
    # The low byte of the sum's bits is the rounded number in two's complement.
    codes = (x.to(tl.float32) * tl.div_rn(127.0, amax) + _ROUND).to(tl.int32, bitcast=True).to(tl.int8)
    return tl.where(top < _INFINITY, codes, 0)


@triton.jit
def _scale(top):
    """Return the scale of a token whose largest magnitude has the bits `top`."""
    amax = tl.maximum(top.to(tl.float32, bitcast=True), _FLOOR)
    return tl.where(top < _INFINITY, tl.div_rn(amax, 127.0), float("nan"))


@triton.jit
def _quantize_kernel(x_ptr, codes_ptr, scales_ptr, k, stride, BLOCK: tl.constexpr, ONE: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride
    codes_ptr += token * k
    offsets = tl.arange(0, BLOCK)
    if ONE:
        x = tl.load(x_ptr + offsets, mask=offsets < k, other=0)
        top = _top(x)
        tl.store(codes_ptr + offsets, _codes(x, top), mask=offsets < k)
    else:
        top = 0
        for start in range(0, k, BLOCK):
            x = tl.load(x_ptr + start + offsets, mask=start + offsets < k, other=0)
            top = tl.maximum(top, _top(x))
        for start in range(0, k, BLOCK):
            x = tl.load(x_ptr + start + offsets, mask=start + offsets < k, other=0)
            tl.store(codes_ptr + start + offsets, _codes(x, top), mask=start + offsets < k)
    tl.store(scales_ptr + token, _scale(top))


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    codes_ptr,
    scales_ptr,
    k,
    stride,
    eps,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < k
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + token * stride + offsets, mask=mask, other=0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + token * k + offsets, mask=mask, other=0).to(tl.float32)
        x = x.to(dtype)
        tl.store(residual_ptr + token * k + offsets, x, mask=mask)
        x = x.to(tl.float32)
    mean = tl.div_rn(tl.sum(x * x), k.to(tl.float32))
    x *= tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0).to(tl.float32)
    if NORM == "llama":
        x = x.to(dtype).to(tl.float32)
    if NORM == "gemma3":
        weight += 1.0
    x = (x * weight).to(dtype)
    top = _top(x)
    tl.store(codes_ptr + token * k + offsets, _codes(x, top), mask=mask)
    tl.store(scales_ptr + token, _scale(top))


@triton.jit
def _gated_kernel(
    x_ptr, codes_ptr, scales_ptr, k, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride
    codes_ptr += token * k
    offsets = tl.arange(0, BLOCK)
    if ONE:
        x = _gate_times_up(x_ptr, offsets, k, ACTIVATION)
        top = _top(x)
        tl.store(codes_ptr + offsets, _codes(x, top), mask=offsets < k)
    else:
        top = 0
        for start in range(0, k, BLOCK):
            top = tl.maximum(top, _top(_gate_times_up(x_ptr, start + offsets, k, ACTIVATION)))
        for start in range(0, k, BLOCK):
            x = _gate_times_up(x_ptr, start + offsets, k, ACTIVATION)
            tl.store(codes_ptr + start + offsets, _codes(x, top), mask=start + offsets < k)
    tl.store(scales_ptr + token, _scale(top))


@triton.jit
def _gate_times_up(x_ptr, offsets, k, ACTIVATION: tl.constexpr):
    """Return activation(gate) * up of a token that holds `k` gates and, behind them, `k` values of up."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.load(x_ptr + offsets, mask=offsets < k, other=0).to(tl.float32)
    up = tl.load(x_ptr + k + offsets, mask=offsets < k, other=0).to(tl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (gate + 0.044715 gate^3)
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    return (gate.to(dtype).to(tl.float32) * up).to(dtype)
