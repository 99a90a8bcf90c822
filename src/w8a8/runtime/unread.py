"""A linear layer that is not in memory: whenever it runs, its weight is read from the checkpoint, and let go again.

Backwards, it is read once more, so that no graph keeps it. For experts, where those of a layer do not fit into memory.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Stored(Protocol):
    """A weight in a checkpoint."""

    def __getitem__(self, _: Any) -> Tensor:
        """Read it, whatever is asked of it."""


class Unread(nn.Linear):  # type: ignore[misc]
    """`y = x @ weight.T`; the weight [out, in] is read from `source`, and used in `dtype` on `device`."""

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str = "meta"
    ) -> None:
        """Make a layer that a `source` is yet to be given to."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = in_features, out_features, None
        self.dtype, self.device = dtype, device
        self.source: Stored | None = None

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], read now."""
        assert self.source is not None
        return self.source[...].to(self.device, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., in] to [..., out]."""
        made: Tensor = _Product.apply(x, self)
        return made


def unread(in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, device: Any) -> nn.Linear:
    """Make a linear layer: one with a bias is kept in memory all the same."""
    if bias:
        return nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
    return Unread(in_features, out_features, dtype, device)


class _Product(torch.autograd.Function):  # type: ignore[misc]
    """The product with a layer's weight, which is read for each of its two uses."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: Unread) -> Tensor:
        """Multiply, and keep nothing but where the weight is."""
        context.layer = layer
        return x @ layer.weight.T

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Carry the gradient back to what was multiplied."""
        return gradient @ context.layer.weight, None
