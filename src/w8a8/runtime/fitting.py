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
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from w8a8.checkpoint import TensorSpec
from w8a8.errors import MissingTensorError, UnsupportedSchemeError
from w8a8.runtime.experts import holds_experts, in_int8
from w8a8.runtime.linear import W8A8Linear, frozen
from w8a8.sources.view import LogicalTensor

Tensor = TensorSpec | LogicalTensor
"""What a checkpoint has, as stored or as a view has it."""

EXPERT = re.compile(r"(?P<place>.+)\.(?P<number>\d+)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)")
"""The name of one expert's linear layer, in a file."""

LINEAR = frozenset({"FalconLinear"})
"""Classes of transformers that are `nn.Linear` in all but the order in which they round."""

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
    """Where a file's tensors go: `places` has each one's name in the model, several the same where they are merged.

    `mapping` is what transformers' loader does to them, `names` what it must do besides, last of its renamings.
    """

    places: Mapping[str, str]
    mapping: Sequence[Any]
    names: Names

    def load(self, model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Mapping[str, str]:
        """Give `model` those weights that are made of `tensors`, by name in the file; `tensor[...]` reads one.

        Returns what could not be loaded into the model, and why, by name in the model.
        """
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=[*self.mapping, self.names],
        )
        with torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
        wrong = {name: f"has shape {list(found)} in the checkpoint" for name, found, _ in info.mismatched_keys}
        wrong |= {name: f"cannot be converted: {error}" for name, error in info.conversion_errors.items()}
        return wrong | dict.fromkeys(info.missing_keys - wrong.keys(), "is not in the checkpoint")


def fit_to(model: PreTrainedModel, tensors: Sequence[Tensor]) -> Fitted:
    """Replace the layers and experts of `model` that `tensors` hold as INT8, by modules without weights.

    Raises `UnsupportedSchemeError` or `MissingTensorError` where something does not fit.
    """
    naming = _Naming(model)
    quantized = {t.name.removesuffix(".weight") for t in tensors if t.dtype == "I8" and t.name.endswith(".weight")}
    places: dict[str, str] = {}
    table: dict[str, str] = {}
    layers: dict[str, Tensor] = {}
    experts: set[str] = set()
    for tensor in tensors:
        module, _, parameter = tensor.name.rpartition(".")
        if module not in quantized:
            places[tensor.name] = naming.full(tensor.name)
            continue
        stack, layer = naming.layer(module)  # a scale goes where its weight goes
        places[tensor.name] = table[naming.renamed(tensor.name)] = f"{layer}.{parameter}"
        if parameter == "weight":
            layers[layer] = tensor
        if stack:
            experts.add(stack)
    named = {places[tensor.name]: tensor for tensor in tensors}
    for stack in sorted(experts):
        split, joined = f"{stack}.down_proj.0.bias" in named, f"{stack}.gate_up_proj.0.weight" in named
        model.set_submodule(stack, in_int8(stack, model.get_submodule(stack), split=split, joined=joined))
        model.get_submodule(stack.rpartition(".")[0])._is_hf_initialized = True  # some would fill the weights replaced
        _check_whole(stack, model.get_submodule(stack), named)
    for layer, weight in layers.items():
        _fit(model, layer, weight, named.get(f"{layer}.weight_scale"))
    return Fitted(places, naming.mapping, Names(table))


class _Naming:
    """How transformers' loader renames a file's tensors, for a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.mapping = get_model_conversion_mapping(model)
        self._model, self._known = model, model.state_dict()
        self._renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]

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
        if found:
            prefix, near = f"{self._model.base_model_prefix}.", found["place"]
            stack, _, _ = self.full(f"{near.removesuffix('.experts')}.down_proj.weight").rpartition(".down_proj")
            for place in (near, prefix + near, near.removeprefix(prefix), stack):
                if holds_experts(_submodule(self._model, place)):
                    return place, f"{place}.{PARTS.get(found['part'], found['part'])}.{found['number']}"
        return "", self.full(f"{module}.weight").removesuffix(".weight")


def _check_whole(place: str, experts: nn.Module, named: Mapping[str, Tensor]) -> None:
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


def _fit(model: PreTrainedModel, name: str, weight: Tensor, scale: Tensor | None) -> None:
    """Put an INT8 layer in the place `name` for a `weight` and its `scale`, where there is none already."""
    layer = _submodule(model, name)
    if type(layer) not in (nn.Linear, W8A8Linear) and type(layer).__name__ not in LINEAR:
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
        if not isinstance(layer, W8A8Linear):
            layer = W8A8Linear(columns, rows, bias=layer.bias is not None, dtype=layer.weight.dtype)
            model.set_submodule(name, layer)
        layer.weight_scale = frozen(torch.empty(scale.shape, dtype=torch.float32))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def settle(model: nn.Module) -> None:
    """Bring the loaded scales of all formats to one shape, and make layers that are tied to an INT8 one that layer."""
    layers = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, W8A8Linear)}
    for layer in layers.values():
        layer.weight_scale = frozen(layer.weight_scale.reshape(-1))
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and id(module.weight) in layers:
            model.set_submodule(name, layers[id(module.weight)])
