"""Rounding with compensation: what rounding one column gets wrong, the columns not yet rounded put right.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) with fixed scales: columns in the order of falling activation power; the
rounding error of each is carried over to the rest by the Cholesky factor of the inverse Hessian, block by block. The
Hessian is that of the layer's squared output error over the activations it will really see, the quantized ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = (0.01, 0.1, 1.0, 10.0)
"""Of the Hessian's mean diagonal; the first that makes its inverse's factor exist in float32."""
BLOCK = 128


@dataclass(frozen=True, slots=True)
class Compensation:
    """The `order` [in] that columns are rounded in, and the `upper` Cholesky factor [in, in] of the inverse Hessian."""

    order: Tensor
    upper: Tensor


def compensation(hessian: Tensor) -> Compensation:
    """How to compensate by `hessian` float32 [in, in], the sum of x xᵀ over tokens x; not at all if it is hopeless."""
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
    """Codes int8 [out, in] of `weight` float32 [out, in] for `scale` [out]."""
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
