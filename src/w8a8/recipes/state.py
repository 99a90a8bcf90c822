"""A decoder layer while it is calibrated, and what its samples are asked for, block by block."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from w8a8.recipes import folding
from w8a8.recipes.batches import TRAINING, Batch, Use
from w8a8.recipes.gptq import Codes, hessian_of, nearest
from w8a8.recipes.groups import Group
from w8a8.runtime.calls import arguments_of
from w8a8.runtime.linear import W8A8Linear, frozen
from w8a8.runtime.samples import Placed
from w8a8.runtime.unread import Unread


class LayerState:
    """A layer in the middle of calibration: finished groups run in INT8, the others as they were.

    `tensors` holds what the finished groups have changed, by the names inside the layer.
    """

    def __init__(self, placed: Placed, dtype: torch.dtype) -> None:
        self.placed, self.layer = placed, placed.layer
        self.dtype = dtype
        self.tensors: dict[str, Codes | Tensor] = {}

    def inputs(self, path: str, use: Use) -> Tensor:
        """The inputs [tokens, in] of the module `path` for the batches of this use, in the checkpoint's dtype."""
        parts = self.placed.each(inputs_of_block, path, self.dtype, use)
        return torch.cat([each for part in parts for each in part])

    def hessian(self, path: str, by_channel: Tensor | float) -> Tensor:
        """The Hessian [in, in] of the linear layer `path` (`gptq.py`), over the batches to compensate by."""
        total: Tensor | None = None
        for part in self.placed.each(hessian_of_block, path, self.dtype, by_channel):
            if part is not None:
                total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def weight(self, path: str) -> Tensor:
        """A weight that is not quantized yet, float32 [out, in]."""
        return self.layer.get_submodule(path).weight.detach().float()

    def take(self, group: Group, scales: Tensor | None, weights: Mapping[str, Codes]) -> None:
        """Fold `scales` into the group's producer, if there are any, and run its consumers in INT8.

        `weights` are those of the consumers that are not rounded to nearest, by path; with scales, all are.
        """
        if scales is not None:
            producer = group.producer
            if producer and isinstance(self.layer.get_submodule(producer), Unread):
                run_as(self.layer, producer, None)  # what is divided has to be in memory
            for name, value in folding.divide(self.layer, group, scales, self.dtype).items():
                path, _, parameter = name.rpartition(".")
                if parameter == "weight_scale":
                    self.tensors[f"{path}.weight"] = Codes(self.layer.get_submodule(path).weight.data, value)
                else:
                    self.tensors[name] = value.to(self.dtype)
            by_channel = folding.expand(scales, folding.heads_of(self.layer, group))
            for name, value in folding.multiply(self.layer, group.readers, by_channel, self.dtype).items():
                self.tensors[name] = value.to(self.dtype)
        for path in group.consumers:
            run_as(self.layer, path, weights.get(path))
        self.tensors |= {f"{path}.weight": codes for path, codes in weights.items()}
        self.placed.changed([*group.consumers, *group.readers, *filter(None, [group.producer])])


def run_as(layer: nn.Module, path: str, weight: Codes | None) -> None:
    """Replace the linear layer `path` by an INT8 one; without `weight`, its own is rounded to nearest."""
    linear = layer.get_submodule(path)
    layer.set_submodule(path, int8_linear(weight or nearest(linear.weight.detach().float()), linear.bias))


def int8_linear(weight: Codes, bias: Tensor | None) -> W8A8Linear:
    """The INT8 layer that computes with `weight`."""
    rows, columns = weight.codes.shape
    made = W8A8Linear(columns, rows, bias=False, device="meta")
    made.weight = frozen(weight.codes)
    made.weight_scale = frozen(weight.scale)
    made.bias = None if bias is None else frozen(bias)
    return made


# --- a block of samples ---


def _inputs(layer: nn.Module, batches: Iterable[Batch], path: str, dtype: torch.dtype) -> Iterator[Tensor]:
    """The inputs [tokens, in] of the module `path` for each batch, as `dtype`."""
    for batch in batches:
        inputs = read_by(layer, path, batch)[0]
        yield inputs.detach().reshape(-1, inputs.shape[-1]).to(dtype)


def read_by(layer: nn.Module, path: str, batch: Batch) -> tuple[Tensor, ...]:
    """What the module `path` is given when `layer` reads a batch, which stops there."""
    found = arguments_of(layer.get_submodule(path), lambda: layer(batch.hidden.clone(), **batch.kwargs))
    assert found is not None
    return found


def inputs_of_block(layer: nn.Module, block: Iterable[Batch], path: str, dtype: torch.dtype, use: Use) -> list[Tensor]:
    """The inputs of the module `path` for the batches of a block that have this use."""
    return [*_inputs(layer, use.of(block), path, dtype)]


def hessian_of_block(
    layer: nn.Module, block: Iterable[Batch], path: str, dtype: torch.dtype, by_channel: Tensor | float
) -> Tensor | None:
    """The Hessian by the inputs of the linear layer `path` for the batches of a block; None where none are for it."""
    return hessian_of(_inputs(layer, TRAINING.of(block), path, dtype), by_channel)
