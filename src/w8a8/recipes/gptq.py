"""Round weights: each to nearest, or with compensation, so that columns not yet rounded correct the errors of others.

Compensation is GPTQ (Frantar et al. 2023, arXiv 2210.17323) with the scales of rounding to nearest: columns are rounded
in the order of falling activation power, and the rounding error of each is carried over to the rest by the Cholesky
factor of the inverse Hessian, block by block. The Hessian is that of the layer's squared output error over the
activations that the engine will multiply, the quantized ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from w8a8.runtime.linear import quantize_tokens

DAMPING = (0.01, 0.1, 1.0, 10.0)
"""Shares of the Hessian's mean diagonal; the first that makes its inverse's factor exist in float32 is added to it."""
BLOCK = 128
"""Number of columns after which errors are carried over to all columns behind them."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight: int8 [out, in] codes, and float32 [out] scales."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Compensation:
    """The `order` [in] that columns are rounded in, and the `upper` Cholesky factor [in, in] of the inverse Hessian."""

    order: Tensor
    upper: Tensor


def nearest(weight: Tensor) -> Codes:
    """Round `weight` [out, in] to nearest, the largest weight of a row to code 127."""
    scale = _row_scale(weight)
    return Codes((weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)


def compensated(weight: Tensor, by: Compensation) -> Codes:
    """Round `weight` [out, in] with compensation, with the scales of rounding to nearest."""
    scale = _row_scale(weight)
    return Codes(round_with(weight, scale, by), scale)


def hessian_of(
    inputs: Iterable[Tensor], by_channel: Tensor | float, shares: Iterable[Tensor | float] = repeat(1.0)
) -> Tensor | None:
    """The sum of x xᵀ [in, in] over tokens x [in], divided by `by_channel` [in] and quantized as engines do it.

    Of each token's outputs only a share is used: there are `shares` [tokens, 1] for each of the `inputs` [tokens, in].
    None without inputs.
    """
    total: Tensor | None = None
    for chunk, share in zip(inputs, shares, strict=False):
        codes, scale = quantize_tokens(chunk.float() / by_channel)
        x = codes.float().mul_(scale * share)
        total = x.T @ x if total is None else total.addmm_(x.T, x)
    return total


def compensation(hessian: Tensor) -> Compensation:
    """How to compensate by `hessian` float32 [in, in]; not at all if no damping makes it invertible."""
    order = hessian.diagonal().argsort(descending=True)
    ordered = hessian[order][:, order]
    mean = ordered.diagonal().mean() + torch.finfo(torch.float32).tiny
    for damping in DAMPING:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                return Compensation(order, upper)
    return Compensation(order, torch.eye(len(order), device=hessian.device))


def round_with(weight: Tensor, scale: Tensor, by: Compensation) -> Tensor:
    """Round `weight` float32 [out, in] for `scale` [out] with compensation, to codes int8 [out, in]."""
    left = weight[:, by.order]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        factor, block = by.upper[start:end, start:end], left[:, start:end]
        rounded, errors = torch.empty_like(block), torch.empty_like(block)
        for j in range(end - start):
            rounded[:, j] = (block[:, j] / scale).round_().clamp_(-127, 127)
            errors[:, j] = (block[:, j] - rounded[:, j] * scale) / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
        codes[:, by.order[start:end]] = rounded.to(torch.int8)
        left[:, end:] -= errors @ by.upper[start:end, end:]
    return codes


def _row_scale(weight: Tensor) -> Tensor:
    amax = weight.abs().amax(1)
    return torch.where(amax > 0, (amax / 127).clamp_min(torch.finfo(torch.float32).tiny), 1)
