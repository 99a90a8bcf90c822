"""RMSNorm in one call: transformers' takes eight operators, and beginning each takes longer than a token's arithmetic.

`w8a8.kernels.cpu.norm` computes what they do, to the bit, for the few tokens of a decoding step. It is used only where
that is proved: a module's class is tried with random weights and tokens when a model is loaded, and one that gives
other bits stays as it is.
"""

import copy
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.kernels.cpu.norm import MOST, ORDERS, norm

KINDS = {torch.bfloat16: "BF16", torch.float32: "F32"}

LANES = (8, 16, 4)
"""Numbers that a vector of torch's may have: not all of its operators use the widest that the CPU has."""

TRIED = (1, 2, 3, 16)
"""Numbers of tokens that a class is tried with."""


class _InOneCall:
    """Goes before a class of RMSNorm; `in_one_call`: what is added to the mean, the order of the products, lanes."""

    weight: Tensor
    in_one_call: tuple[float, str, int]

    def forward(self, x: Tensor) -> Tensor:
        """Norm `x` [..., inputs]."""
        weight = self.weight
        inputs = weight.shape[0]
        cpu = x.device.type == weight.device.type == "cpu"
        fits = cpu and x.dtype == weight.dtype and x.dtype in KINDS and x.shape[-1] == inputs and weight.is_contiguous()
        if not fits or x.numel() >= MOST or torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        if not (x.is_contiguous() or (x.dim() == 4 and x.transpose(1, 2).is_contiguous())):
            x = x.contiguous()
        y = torch.empty_like(x)  # in the same order as `x`
        shape = x.numel() // inputs, inputs
        norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), shape, KINDS[x.dtype], *self.in_one_call)
        return y


def in_one_call(model: Any) -> Any:
    """Have every RMSNorm of `model` for which it is proved computed in one call, in place; return `model`."""
    proved: dict[Any, tuple[float, str, int] | None] = {}
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not type(module).__name__.endswith("RMSNorm") or weight is None or not isinstance(eps, float):
            continue
        if weight.dim() != 1 or weight.device.type != "cpu" or len(module._parameters) != 1:
            continue
        kind: Any = type(module)
        key = kind, len(weight), weight.dtype, eps
        if key not in proved:
            proved[key] = _proved(module, eps)
        if (found := proved[key]) is not None:
            module.in_one_call = found
            module.__class__ = _class(kind)
    return model


@cache
def _class(kind: Any) -> Any:
    """Return `kind` with the kernel before it."""
    return type(kind.__name__, (_InOneCall, kind), {})


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _proved(module: nn.Module, eps: float) -> tuple[float, str, int] | None:
    """Find how the kernel gives the same bits as `module` with weights and tokens drawn at random."""
    generator = torch.Generator().manual_seed(0)
    theirs = copy.deepcopy(module)
    weight = theirs.weight
    weight.copy_(torch.randn(weight.shape, generator=generator))
    tokens = [
        (torch.randn(1, count, len(weight), generator=generator) * 10.0**power).to(weight.dtype)
        for count in TRIED
        for power in (-4, 0, 3)
    ]
    try:
        expected = [theirs(x) for x in tokens]
    except Exception:  # noqa: BLE001 - it takes more than an input: it stays as it is
        return None
    kind: Any = type(module)
    theirs.__class__ = _class(kind)
    for order, lanes in product(ORDERS, LANES):
        theirs.in_one_call = how = eps, order, lanes
        found = [theirs(x) for x in tokens]
        if all(y.dtype == x.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True)):
            return how
    return None
