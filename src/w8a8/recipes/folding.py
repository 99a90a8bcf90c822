"""Fold scales into a group: divide its producer's channels by them, for its consumers' columns to be multiplied."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from w8a8.recipes.groups import Group
from w8a8.runtime.linear import W8A8Linear, frozen

Heads = tuple[int, int, int]
"""Number of key-value heads, query heads per key-value head, channels per head."""


def channels_of(layer: nn.Module, group: Group) -> int:
    """The number of channels of the group's producer that its consumers read."""
    assert group.producer is not None
    if group.kind == "value":
        rows: int = layer.get_submodule(group.producer).out_features
        return rows - group.start
    columns: int = layer.get_submodule(group.consumers[0]).in_features
    return columns


def heads_of(layer: nn.Module, group: Group) -> Heads | None:
    """How query heads share the producer's channels; None where each channel reaches the consumers once."""
    if group.kind != "value" or group.producer is None:
        return None
    size: int = layer.get_submodule(group.producer.rpartition(".")[0]).head_dim  # the attention's
    channels = channels_of(layer, group)
    return channels // size, layer.get_submodule(group.consumers[0]).in_features // channels, size


def expand(scales: Tensor, heads: Heads | None) -> Tensor:
    """The scale of every input channel [in] of the consumers, from the scales of the producer's channels."""
    if heads is None:
        return scales
    shared, times, size = heads
    return scales.view(shared, 1, size).expand(shared, times, size).reshape(-1)


def largest(channels: Tensor, heads: Heads | None) -> Tensor:
    """The largest of the consumers' `channels` [in] that each channel of the producer feeds."""
    if heads is None:
        return channels
    shared, times, size = heads
    return channels.view(shared, times, size).amax(1).reshape(-1)


def _gain(layer: nn.Module, norm: str, group: Group) -> Tensor:
    """The factors of a norm for its channels."""
    weight: Tensor = layer.get_submodule(norm).weight.detach() + group.offset
    return weight


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as `dtype` can hold them."""
    return values.to(dtype).to(values.dtype)


def storable(layer: nn.Module, group: Group, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The scales that folding `scales` amounts to, once a norm's weight is rounded to `dtype`.

    A channel that the norm switches off, or that rounding would switch off, has scale 1.
    """
    if group.kind != "norm" or group.producer is None:
        return scales
    before = _gain(layer, group.producer, group)
    folded = _rounded(before / scales - group.offset, dtype) + group.offset
    return torch.where((before == 0) | (folded == 0), 1, before / folded)


def divide(layer: nn.Module, group: Group, scales: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Divide the channels of the group's producer in `layer` by `scales`; return its changed parameters by name.

    A norm's weight and a bias are rounded to `dtype`; an INT8 weight keeps its codes. Parameters of `layer` are
    replaced, not written to.
    """
    if group.producer is None:
        return {}
    producer = layer.get_submodule(group.producer)
    changed: dict[str, Tensor] = {}
    if group.kind == "norm":
        folded = _gain(layer, group.producer, group) / scales - group.offset
        changed["weight"] = torch.where(scales == 1, producer.weight, _rounded(folded, dtype))
    else:
        scales = by_row(scales, producer.out_features, group.start)
        if isinstance(producer, W8A8Linear):
            changed["weight_scale"] = producer.weight_scale / scales
        else:
            changed["weight"] = producer.weight / scales[:, None]
    if getattr(producer, "bias", None) is not None:
        changed["bias"] = _rounded(producer.bias / scales, dtype)
    return put(layer, {f"{group.producer}.{name}": value for name, value in changed.items()})


def by_row(scales: Tensor, rows: int, start: int) -> Tensor:
    """The scales of `rows` rows [rows], of which those from `start` on have `scales`, and the others 1."""
    made = scales.new_ones(rows)
    made[start : start + len(scales)] = scales
    return made


def multiply(layer: nn.Module, paths: Iterable[str], by_channel: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Multiply the columns of the weights [out, in] of the modules `paths` by `by_channel` [in].

    They are rounded to `dtype`, and returned by name. Parameters of `layer` are replaced, not written to.
    """
    weights: dict[str, Tensor] = {f"{path}.weight": layer.get_submodule(path).weight for path in paths}
    return put(layer, {name: _rounded(weight * by_channel, dtype) for name, weight in weights.items()})


def shared_copy(layer: nn.Module) -> nn.Module:
    """A copy with the same parameters, buffers and remembered states, whose modules can be replaced."""
    remembered = (value for module in layer.modules() for value in vars(module).values() if isinstance(value, Tensor))
    tensors = [*layer.parameters(), *layer.buffers(), *remembered]
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors})


def put(layer: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put `values` in the place of the parameters of these names; return them."""
    for name, value in values.items():
        path, _, parameter = name.rpartition(".")
        setattr(layer.get_submodule(path), parameter, frozen(value.detach()))
    return {name: value.detach() for name, value in values.items()}
