"""The exact reference: a model whose INT8 layers are computed as `runtime/linear.py` defines them, in FP32 arithmetic.

It is the source model in FP32, run by transformers' own code; wherever that multiplies by a weight that is INT8 in the
result, the weight is quantized per output channel and the other operand per token. Nothing of this project runs in it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from w8a8.runtime import W8A8Linear

PLACES: Mapping[Callable[..., Any], tuple[int, int, int]] = {
    # function: which argument is the input, which the weight, and the weight's dimension that is summed over
    functional.linear: (0, 1, -1),
    torch.matmul: (0, 1, -2),
    Tensor.matmul: (0, 1, -2),
    Tensor.__matmul__: (0, 1, -2),
    torch.bmm: (0, 1, -2),
    Tensor.bmm: (0, 1, -2),
    torch.addmm: (1, 2, -2),
    torch.baddbmm: (1, 2, -2),
}


FLOOR = 2.0**-100
"""Keeps scales of zeros from dividing by zero."""


class InInt8(TorchFunctionMode):  # type: ignore[misc]
    """Within it, products with one of the `weights`, or with a part of it, are those of INT8 W8A8."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items()}
        self.unused = set(self.names)

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        if place := PLACES.get(function):
            x, weight, summed = place
            if (storage := arguments[weight].untyped_storage().data_ptr()) in self.names:
                self.unused.discard(storage)
                changed = list(arguments)
                changed[x] = rounded_inputs(arguments[x])
                changed[weight] = rounded_weight(arguments[weight], summed)
                arguments = changed
        return function(*arguments, **(options or {}))


def rounded_inputs(values: Tensor) -> Tensor:
    """Activations [..., in] in INT8, with one scale per token."""
    largest = values.abs().amax(-1, keepdim=True).clamp_min(FLOOR)
    ends = torch.full_like(largest, 127)  # torch divides numbers by tensors in another way
    return (values * (ends / largest)).round() * (largest / ends)


def rounded_weight(values: Tensor, dim: int) -> Tensor:
    """A weight in INT8, with one scale per output channel; `dim` is the one that is summed over."""
    scale = values.abs().amax(dim, keepdim=True).clamp_min(FLOOR) / 127
    return (values / scale).round() * scale


def int8_weights(model: nn.Module, quantized: nn.Module) -> dict[str, Tensor]:
    """The weights of `model`, by name, that are INT8 in `quantized`, the same model as `w8a8.runtime` loads it.

    Where an INT8 layer has no counterpart by its name, it is an expert's: the module around it holds those of all.
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for name, layer in quantized.named_modules():
        if isinstance(layer, W8A8Linear):
            while name not in modules:
                name = name.rpartition(".")[0]
            own = modules[name].named_parameters(name, recurse=False)
            found |= {each: values for each, values in own if values.ndim >= 2 and "bias" not in each}
    return found
