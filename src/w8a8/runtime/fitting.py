"""Fit a model of transformers to a checkpoint: its INT8 layers and experts are replaced, its tensors get their places.

A module whose weight is stored as I8 is quantized. Names in the files become names in the model by transformers' own
renamings. Its loader would then merge the tensors of a layer's experts into one; those of INT8 experts stay apart
(`w8a8.runtime.experts`), and those of any experts if that is asked for, so they are renamed once more, to what the
loader leaves alone. Where it cuts a matrix into those of several layers, or puts some together, along their rows, it
does so with codes and scales alike.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Split,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from w8a8.checkpoint import TensorSpec
from w8a8.errors import MissingTensorError, UnsupportedSchemeError
from w8a8.runtime.experts import Linear, apart, holds_experts, in_int8
from w8a8.runtime.linear import W8A8Linear, frozen
from w8a8.sources.view import LogicalTensor

Tensor = TensorSpec | LogicalTensor
"""What a checkpoint has, as stored or as a view has it."""

EXPERT = re.compile(r"(?P<place>.+)\.(?P<number>\d+)\.(?P<part>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)")
"""The name of one expert's linear layer, in a file."""

LINEAR = frozenset({"FalconLinear"})
"""Classes of transformers that are `nn.Linear` in all but the order in which they round."""

UNUSED = "weights_of_no_use"
"""What names begin with that weights of experts get that need none (LongCat Flash)."""

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

    `changed` are those that transformers' loader does not take as they are. `mapping` is what it does to them, `more`
    what it must do besides, after that.
    """

    places: Mapping[str, str]
    changed: Set[str]
    mapping: Sequence[Any]
    more: Sequence[Any]

    def load(self, model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device) -> Mapping[str, str]:
        """Give `model` those weights that are made of `tensors`, by name in the file; `tensor[...]` reads one.

        Returns what could not be loaded into the model, and why, by name in the model.
        """
        config = LoadStateDictConfig(
            device_map={"": device},
            dtype_plan=model._get_dtype_plan(model.dtype),
            weight_mapping=[*self.mapping, *self.more],
        )
        with torch.no_grad():
            info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), config)
        wrong = {name: f"has shape {list(found)} in the checkpoint" for name, found, _ in info.mismatched_keys}
        wrong |= {name: f"cannot be converted: {error}" for name, error in info.conversion_errors.items()}
        return wrong | dict.fromkeys(info.missing_keys - wrong.keys(), "is not in the checkpoint")


def fit_to(model: PreTrainedModel, tensors: Sequence[Tensor], experts: Linear | None = None) -> Fitted:
    """Replace the layers and experts of `model` that `tensors` hold as INT8, by modules without weights.

    With `experts`, those that are not INT8 lie apart too, if they do in `tensors`; their layers are made by it.

    Raises `UnsupportedSchemeError`, `UnsupportedModelError` or `MissingTensorError` where something does not fit.
    """
    naming = _Naming(model)
    stored = {tensor.name: tensor for tensor in tensors}
    weights = [t.name.removesuffix(".weight") for t in tensors if t.name.endswith(".weight")]
    quantized = {module for module in weights if stored[f"{module}.weight"].dtype == "I8"}
    wanted = [module for module in weights if module in quantized or (experts and naming.is_expert(module))]
    found = {module: naming.find(module) for module in wanted}
    found = {module: place for module, place in found.items() if module in quantized or place.stack}
    places: dict[str, str] = {}
    table: dict[str, str] = {}
    changed = set()
    for tensor in tensors:
        module, _, parameter = tensor.name.rpartition(".")
        place = found.get(module)
        if place is None:
            places[tensor.name], pattern = naming.converted(tensor.name)
            if pattern:
                changed.add(tensor.name)
            continue
        places[tensor.name] = f"{place.layers[0]}.{parameter}"  # a scale goes where its weight goes
        if place.converter is None:
            table[naming.renamed(tensor.name)] = places[tensor.name]
        else:
            changed.add(tensor.name)
    named = {places[tensor.name]: tensor for tensor in tensors}
    for stack in sorted({place.stack for place in found.values()} - {""}):
        split, joined = f"{stack}.down_proj.0.bias" in named, f"{stack}.gate_up_proj.0.weight" in named
        down, whole = named.get(f"{stack}.down_proj.0.weight"), model.get_submodule(stack)
        if experts is not None and down is not None and down.dtype != "I8":
            model.set_submodule(stack, apart(stack, whole, experts, split=split, joined=joined))
        else:
            model.set_submodule(stack, in_int8(stack, whole, split=split, joined=joined))
            _check_whole(stack, model.get_submodule(stack), named)
        model.get_submodule(stack.rpartition(".")[0])._is_hf_initialized = True  # some would fill the weights replaced
    parts = defaultdict(list)
    for module, place in found.items():
        if UNUSED in place.layers[0]:
            model._keys_to_ignore_on_load_unexpected.add(UNUSED)
            continue
        if module in quantized:
            parts[place.layers].append((stored[f"{module}.weight"], stored.get(f"{module}.weight_scale")))
    for layers, own in parts.items():
        _fit(model, layers, own)
    scales = {id(place.converter): place.converter for place in found.values() if place.converter}
    return Fitted(places, changed, naming.mapping, [Names(table), *map(_for_scales, scales.values())])


def _for_scales(converter: WeightConverter) -> WeightConverter:
    """What does with scales as `converter` does with weights."""
    sources, targets = (
        [re.sub("weight$", "weight_scale", pattern) for pattern in patterns]
        for patterns in (converter.source_patterns, converter.target_patterns)
    )
    return converter.copy(sources, targets, operations=converter.operations)


@dataclass(frozen=True)
class _Place:
    """Where a quantized module of a file goes: into one of `layers`, or as parts into all of them, by `converter`.

    `stack` is the place of the experts that it is one of; empty for none.
    """

    layers: tuple[str, ...]
    stack: str = ""
    converter: WeightConverter | None = None


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

    def is_expert(self, module: str) -> bool:
        """Whether a `module` is called like one expert's linear layer."""
        return EXPERT.fullmatch(self.renamed(f"{module}.weight").removesuffix(".weight")) is not None

    def find(self, module: str) -> _Place:
        """The place of a `module` that is quantized, or one of experts."""
        full, pattern = self.converted(f"{module}.weight")
        converter = next((each for each in self._converters if pattern in each.source_patterns), None)
        first, *others = converter.target_patterns if converter else [""]
        names = (full, *(full.replace(first, other) for other in others))
        if found := EXPERT.fullmatch(self.renamed(f"{module}.weight").removesuffix(".weight")):
            part, number = PARTS.get(found["part"], found["part"]), int(found["number"])
            for place in self._stacks(found["place"], names if others else ()):
                experts = _submodule(self._model, place)
                count = len(experts.down_proj) if holds_experts(experts) else 0
                if number < count or (count and not others):
                    unused = number >= count and bool(getattr(experts, "zero_expert_num", 0))
                    return _Place(
                        (f"{place}.{UNUSED}_{number}_{part}" if unused else f"{place}.{part}.{number}",), place
                    )
                number -= count
        if converter is None or not all(map(_by_rows, converter.operations)):
            return _Place((full.removesuffix(".weight"),))
        return _Place(tuple(name.removesuffix(".weight") for name in names), converter=converter)

    def _stacks(self, near: str, names: Sequence[str]) -> Iterator[str]:
        """Where the experts may be that a file has at `near`; by `names`, where the model has them in parts."""
        if names:
            yield from (name.rpartition(".")[0] for name in names)
            return
        prefix = f"{self._model.base_model_prefix}."
        yield from (near, prefix + near, near.removeprefix(prefix))
        yield self.converted(f"{near.removesuffix('.experts')}.down_proj.weight")[0].rpartition(".down_proj")[0]

    def converted(self, name: str) -> tuple[str, str | None]:
        """The name in the model, for one of several tensors that are converted into one too; and the pattern of the
        converter that makes it, if one does."""
        prefix = self._model.base_model_prefix
        full, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._known)
        return str(full), pattern


def _by_rows(operation: Any) -> bool:
    """Whether an operation cuts matrices into pieces of whole rows, or puts such together."""
    known = isinstance(operation, Chunk | Split | Concatenate)
    return known and operation.dim == 0 and not getattr(operation, "num_shards_attribute", None)


def _check_whole(place: str, experts: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Check that a file has each tensor of INT8 experts, and no other in their place."""
    wanted = {f"{place}.{name}" for name in experts.state_dict()}
    for name, tensor in named.items():
        if name.startswith(f"{place}.") and name not in wanted and UNUSED not in name:
            raise UnsupportedSchemeError(
                f"{tensor.shard}: {tensor.name} ({tensor.dtype}) is no part of the INT8 experts beside it; all experts "
                "of a layer that the config counts must be INT8, or none"
            )
    if missing := sorted(wanted - named.keys()):
        raise MissingTensorError(
            f"{place} holds INT8 experts, and {missing[0].removeprefix(place + '.')} is missing (of {len(missing)} "
            "tensors, by projection and expert); the checkpoint is broken"
        )


def _fit(model: PreTrainedModel, names: Sequence[str], parts: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Put INT8 layers in the places `names` for weights and their scales, where there are none already.

    Together the layers have as many rows as the weights: one weight is cut, or several are put together.
    """
    layers = [_submodule(model, name) for name in names]
    weight = parts[0][0]
    for layer in layers:
        if type(layer) not in (nn.Linear, W8A8Linear) and type(layer).__name__ not in LINEAR:
            found = "no layer" if layer is None else f"a {type(layer).__name__}"
            raise UnsupportedSchemeError(
                f"{weight.shard}: {weight.name} is INT8, but {type(model).__name__} has {found} in its place; only "
                "plain linear layers and experts can run in INT8 here. vLLM may load it"
            )
    rows, columns = sum(layer.out_features for layer in layers), layers[0].in_features
    of_weights = sum(weight.shape[0] for weight, _ in parts)
    scale_columns: tuple[int, ...] = ()
    for weight, scale in parts:
        if scale is None:
            raise MissingTensorError(
                f"{weight.shard}: {weight.name} is INT8 and has no weight_scale; the checkpoint is broken"
            )
        own = weight.shape[0]
        if (of_weights, weight.shape[1:]) != (rows, (columns,)) or scale.shape not in ((own,), (own, 1)):
            raise UnsupportedSchemeError(
                f"{weight.shard}: {weight.name} has shape {list(weight.shape)} and scales {list(scale.shape)}; a "
                f"linear layer of {rows} x {columns} with one scale per output channel was expected"
            )
        scale_columns = scale.shape[1:]
    for name, layer in zip(names, layers, strict=True):
        with torch.device("meta"):
            new = layer
            if not isinstance(layer, W8A8Linear):
                new = W8A8Linear(columns, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
                model.set_submodule(name, new)
            new.weight_scale = frozen(torch.empty(layer.out_features, *scale_columns, dtype=torch.float32))


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
