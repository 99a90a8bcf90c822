"""Rounding with compensation: what rounding one column gets wrong, the columns not yet rounded put right.

GPTQ (Frantar et al. 2023, arXiv 2210.17323) with fixed scales: columns in the order of falling activation power; the
rounding error of each is carried over to the rest by the Cholesky factor of the inverse Hessian, block by block. The
Hessian is that of the layer's squared output error over the activations it will really see, the quantized ones.
"""

import torch
from torch import Tensor

DAMPING = 0.01
BLOCK = 128


def round_with(weight: Tensor, hessian: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 [out, in] of `weight` float32 [out, in] for `scale` [out], by `hessian` [in, in] = sum of x xᵀ.

    `hessian` is overwritten.
    """
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True)
    upper = _inverse_factor(hessian[order][:, order])
    left = weight[:, order]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        factor, block = upper[start:end, start:end], left[:, start:end]
        rounded, errors = torch.empty_like(block), torch.empty_like(block)
        for j in range(end - start):
            rounded[:, j] = (block[:, j] / scale).round_().clamp_(-127, 127)
            errors[:, j] = (block[:, j] - rounded[:, j] * scale) / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
        codes[:, order[start:end]] = rounded.to(torch.int8)
        left[:, end:] -= errors @ upper[start:end, end:]
    return codes


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of `hessian`, damped; in the memory of `hessian`."""
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean() + torch.finfo(torch.float32).tiny
    torch.linalg.cholesky(hessian, out=hessian)
    torch.cholesky_inverse(hessian, out=hessian)
    return torch.linalg.cholesky(hessian, upper=True, out=hessian)
