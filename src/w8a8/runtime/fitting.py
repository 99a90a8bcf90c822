"""Fit a model of transformers to a checkpoint: its INT8 layers and experts are replaced, its tensors get their places.

A module whose weight is stored as I8 is quantized. Names in the files become names in the model by transformers' own
renamings. Its loader would then merge the tensors of a layer's experts into one; those of INT8 experts stay apart
(`w8a8.runtime.experts`), so they are renamed once more, to what the loader leaves alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, apply_renamings, rename_source_key

from w8a8.checkpoint import TensorSpec
from w8a8.errors import MissingTensorError, UnsupportedSchemeError
from w8a8.runtime.experts import holds_experts, in_int8
from w8a8.runtime.linear import W8A8Linear, frozen

EXPERT = re.compile(r"(?P<place>.+)\.(?P<number>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)")
"""The name of one expert's linear layer, in a file."""

PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Other names of an expert's linear layers."""


class Names(WeightRenaming):  # type: ignore[misc]
    """A renaming by a table. transformers' loader applies it like its own renamings, in their order."""

    def __init__(self, table: Mapping[str, str]) -> None:
        """Rename what `table` has; the rest keeps its name."""
        super().__init__("none", "none")
        self.table = table

    def rename_source_key(self, source_key: str) -> tuple[str, None]:
        """Return the new name, and that no converter matched."""
        return self.table.get(source_key, source_key), None


@dataclass(frozen=True)
class Fitted:
    """The files' tensors by their names in the model; `names` is the renaming that their loader must apply last."""

    tensors: Mapping[str, TensorSpec]
    names: Names


def fit_to(model: PreTrainedModel, tensors: Sequence[TensorSpec]) -> Fitted:
    """Replace the layers and experts of `model` that `tensors` hold as INT8, by modules without weights.

    Raises `UnsupportedSchemeError` or `MissingTensorError` where something does not fit.
    """
    naming = _Naming(model)
    quantized = {t.name.removesuffix(".weight") for t in tensors if t.dtype == "I8" and t.name.endswith(".weight")}
    named: dict[str, TensorSpec] = {}
    table: dict[str, str] = {}
    layers: dict[str, TensorSpec] = {}
    places: set[str] = set()
    for tensor in tensors:
        module, _, parameter = tensor.name.rpartition(".")
        if module not in quantized:
            named[naming.full(tensor.name)] = tensor
            continue
        place, layer = naming.layer(module)  # a scale goes where its weight goes
        named[f"{layer}.{parameter}"] = tensor
        table[naming.renamed(tensor.name)] = f"{layer}.{parameter}"
        if parameter == "weight":
            layers[layer] = tensor
        if place:
            places.add(place)
    for place in sorted(places):
        split = f"{place}.down_proj.0.bias" in named
        model.set_submodule(place, in_int8(place, model.get_submodule(place), split=split))
        _check_whole(place, model.get_submodule(place), named)
    for layer, weight in layers.items():
        _fit(model, layer, weight, named.get(f"{layer}.weight_scale"))
    return Fitted(named, Names(table))


class _Naming:
    """How transformers' loader renames a file's tensors, for a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        mapping = get_model_conversion_mapping(model)
        self._model, self._known = model, model.state_dict()
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def renamed(self, name: str) -> str:
        """The name before tensors are converted, which `Names` sees."""
        return str(apply_renamings(name, self._renamings))

    def full(self, name: str) -> str:
        """The name in the model, for one of several tensors that are converted into one too."""
        prefix = self._model.base_model_prefix
        return str(rename_source_key(name, self._renamings, self._converters, prefix, self._known)[0])

    def layer(self, module: str) -> tuple[str, str]:
        """The place of the experts that a quantized `module` is part of, empty for none, and its own name."""
        found = EXPERT.fullmatch(self.renamed(f"{module}.weight").removesuffix(".weight"))
        prefix = f"{self._model.base_model_prefix}."
        places = () if found is None else (found["place"], prefix + found["place"], found["place"].removeprefix(prefix))
        for place in places:
            if found and holds_experts(_submodule(self._model, place)):
                return place, f"{place}.{PARTS.get(found['part'], found['part'])}.{found['number']}"
        return "", self.full(f"{module}.weight").removesuffix(".weight")


def _check_whole(place: str, experts: nn.Module, named: Mapping[str, TensorSpec]) -> None:
    """Check that a file has each tensor of INT8 experts, and no other in their place."""
    wanted = {f"{place}.{name}" for name in experts.state_dict()}
    for name, tensor in named.items():
        if name.startswith(f"{place}.") and name not in wanted:
            raise UnsupportedSchemeError(
                f"{tensor.shard}: {tensor.name} ({tensor.dtype}) is no part of the INT8 experts beside it; all experts "
                "of a layer that the config counts must be INT8, or none"
            )
    if missing := sorted(wanted - named.keys()):
        raise MissingTensorError(
            f"{place} holds INT8 experts, and {missing[0].removeprefix(place + '.')} is missing (of {len(missing)} "
            "tensors, by projection and expert); the checkpoint is broken"
        )


def _fit(model: PreTrainedModel, name: str, weight: TensorSpec, scale: TensorSpec | None) -> None:
    """Put an INT8 layer in the place `name` for a `weight` and its `scale`, where there is none already."""
    layer = _submodule(model, name)
    if type(layer) not in (nn.Linear, W8A8Linear):
        found = "no layer" if layer is None else f"a {type(layer).__name__}"
        raise UnsupportedSchemeError(
            f"{weight.shard}: {weight.name} is INT8, but {type(model).__name__} has {found} in its place; only plain "
            "linear layers and experts can run in INT8 here. vLLM may load it"
        )
    if scale is None:
        raise MissingTensorError(
            f"{weight.shard}: {weight.name} is INT8 and has no weight_scale; the checkpoint is broken"
        )
    rows, columns = layer.out_features, layer.in_features
    if weight.shape != (rows, columns) or scale.shape not in ((rows,), (rows, 1)):
        raise UnsupportedSchemeError(
            f"{weight.shard}: {weight.name} has shape {list(weight.shape)} and scales {list(scale.shape)}; a linear "
            f"layer of {rows} x {columns} with one scale per output channel was expected"
        )
    with torch.device("meta"):
        if type(layer) is nn.Linear:
            layer = W8A8Linear(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)
            model.set_submodule(name, layer)
        layer.weight_scale = frozen(torch.empty(scale.shape, dtype=torch.float32))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def settle(model: nn.Module) -> None:
    """Bring the loaded scales of all formats to one shape."""
    for layer in model.modules():
        if isinstance(layer, W8A8Linear):
            layer.weight_scale = frozen(layer.weight_scale.reshape(-1))
