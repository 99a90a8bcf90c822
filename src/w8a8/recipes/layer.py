"""One decoder layer, calibrated: which codes its weights get, and what is folded into its norms.

The groups of `groups.py` are done in the order they run, so that each sees the inputs that the quantized ones before
it produce.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from w8a8.recipes.groups import Group
from w8a8.runtime.linear import W8A8Linear

RecipeName = Literal["rtn", "smooth", "smooth+gptq", "auto"]


class Batch(Protocol):
    """Inputs of the layer: `hidden` [batch, tokens, hidden] as the quantized layers before it produce them,
    `reference` as the unquantized model does, and what else the layer's forward takes."""

    hidden: Tensor
    reference: Tensor
    kwargs: Mapping[str, Any]
    held_out: bool


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a layer is quantized."""

    name: RecipeName = "auto"


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight: int8 [out, in], and float32 [out] scales."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Gain:
    """Of one group: its relative error on held-out batches rounded to nearest, and as `chosen`."""

    group: str
    rtn: float
    error: float
    chosen: str


@dataclass(frozen=True, slots=True)
class LayerResult:
    """What became of a layer: `tensors` by their names inside it, and what each group gained.

    A weight of a linear layer that has no entry is to be rounded to nearest.
    """

    tensors: Mapping[str, Codes | Tensor]
    gains: tuple[Gain, ...]


def calibrate_layer(
    layer: nn.Module, groups: Sequence[Group], batches: Iterable[Batch], recipe: Recipe, dtype: torch.dtype
) -> LayerResult:
    """Choose foldings and codes for `layer`, a decoder layer with float32 weights, which is left as it is.

    `batches` can be iterated more than once. Folded norms and biases come out rounded to `dtype`, the checkpoint's.
    """
    tensors: dict[str, Codes | Tensor] = {
        f"{path}.weight": nearest(layer.get_submodule(path).weight) for group in groups for path in group.consumers
    }
    return LayerResult(tensors, ())


def quantized(layer: nn.Module, result: LayerResult) -> nn.Module:
    """The layer as it will run: INT8 linear layers, folded norms. Shares with `layer` what is the same."""
    made = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for name, value in result.tensors.items():
        path, _, parameter = name.rpartition(".")
        module = made.get_submodule(path)
        if isinstance(value, Codes):
            made.set_submodule(path, int8_linear(value, module.bias))
        else:
            setattr(
                module,
                parameter,
                nn.Parameter(
                    value.to(module.weight_scale.dtype if isinstance(module, W8A8Linear) else module.weight.dtype),
                    requires_grad=False,
                ),
            )
    return made


def int8_linear(weight: Codes, bias: Tensor | None) -> W8A8Linear:
    """The layer that runs `weight`."""
    rows, columns = weight.codes.shape
    made = W8A8Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.codes, requires_grad=False)
    made.weight_scale = nn.Parameter(weight.scale, requires_grad=False)
    made.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return made


def nearest(weight: Tensor) -> Codes:
    """`weight` [out, in] rounded to nearest, with the row's largest weight as code 127."""
    weight = weight.detach().float()
    scale = torch.where((amax := weight.abs().amax(1)) > 0, amax / 127, 1)
    return Codes((weight / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale)
