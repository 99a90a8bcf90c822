"""The groups of every layer of a model: by its architecture's table, or found by running layers (`recipes/trace`)."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.errors import UnsupportedModelError, first_line
from w8a8.plan import Rules, architecture_of
from w8a8.plan.architectures import EACH
from w8a8.recipes.groups import Group, groups_of
from w8a8.recipes.trace import random_copy, trace
from w8a8.runtime.calls import Call, States
from w8a8.runtime.experts import LAYER
from w8a8.runtime.streamed import StreamedModel, passed

TOKENS = 16
"""Number of tokens that a layer reads to be traced."""


def groups_of_layers(
    model: StreamedModel, config: Mapping[str, Any], ids: Sequence[int], notice: Callable[[str], None]
) -> list[tuple[Group, ...]]:
    """The groups of each layer, in order; `ids` are any tokens.

    Raises UnsupportedModelError where a layer cannot be run by itself, or no layer has a group.
    """
    if architecture_of(config).groups:
        return [groups_of(config, model.hollow(number)) for number in range(model.count)]
    found = traced(model, Rules.for_config(config), ids[:TOKENS])
    if not any(found):
        raise UnsupportedModelError(
            f"{model.name}: none of its quantized layers reads each token once, so only --recipe rtn is for it"
        )
    notice(f"no table says what feeds what in {config.get('model_type')}; found by running its layers:")
    for each in described(found):
        notice(each)
    return found


def traced(model: StreamedModel, rules: Rules, ids: Sequence[int]) -> list[tuple[Group, ...]]:
    """The groups of each layer, found by tracing a layer of every kind; `ids` are some tokens."""
    states, kwargs = model.embed(ids)
    hidden = torch.randn(states.shape, generator=torch.Generator().manual_seed(2)).to(model.device)
    known: dict[Any, tuple[Group, ...]] = {}
    left: Mapping[str, Tensor] = {}
    found = []
    for number in range(model.count):
        layer, consumers = model.hollow(number), _quantized(model, number, rules)
        kind = (kind_of(layer), consumers)
        if kind not in known:
            copy, call = random_copy(layer, model.device), Call(States(hidden, left), kwargs[number])
            try:
                known[kind] = trace(copy, call, consumers)
                left = passed(copy, call).left
            except Exception as error:
                raise UnsupportedModelError(
                    f"{model.name}: layer {number} cannot be run by itself: {first_line(error)}"
                ) from error
        found.append(tuple(_changeable(model, number, group) for group in known[kind]))
    return found


def _quantized(model: StreamedModel, number: int, rules: Rules) -> frozenset[str]:
    """The linear layers of a decoder layer that are quantized unless one asks for something else."""
    linear = [path for path, module in model.hollow(number).named_modules() if isinstance(module, nn.Linear)]
    stored = [path for path in linear if model.is_stored(number, f"{path}.weight")]
    return frozenset(path for path in stored if rules.judge(model.tensor(number, f"{path}.weight")).quantize)


def _changeable(model: StreamedModel, number: int, group: Group) -> Group:
    """The group; without its producer, if folding would change what the checkpoint has in another form."""
    if group.producer is None:
        return group
    producer = model.hollow(number).get_submodule(group.producer)
    changed = [f"{group.producer}.{name}" for name, _ in producer.named_parameters(recurse=False)]
    changed += [f"{path}.weight" for path in group.readers]
    return group if all(model.is_stored(number, name) for name in changed) else replace(group, producer=None)


def kind_of(layer: nn.Module) -> tuple[Any, ...]:
    """What tells kinds of layers apart: their modules, the sizes of these, and their settings, but for the number."""
    return tuple(
        (
            path,
            type(module).__name__,
            tuple((name, value.shape) for name, value in module.named_parameters(recurse=False)),
            tuple(
                (name, value)
                for name, value in vars(module).items()
                if isinstance(value, bool | int | str) and not re.search("layer_(i|num)|idx", name)
            ),
        )
        for path, module in layer.named_modules()
    )


def described(layers: Sequence[Sequence[Group]]) -> list[str]:
    """Say which groups there are, what their scales go into, and in how many layers."""
    told = Counter(what for layer in layers for what in dict.fromkeys(map(_described, layer)))
    return [f"{what} ({count} of {len(layers)} layers)" for what, count in told.items()]


def _described(group: Group) -> str:
    if group.producer is None:
        return f"{group.name}: no scales"
    expert = LAYER.fullmatch(group.producer)
    producer = f"{expert['place']}.{expert['part']}.{EACH}" if expert else group.producer
    return f"{group.name}: scales go into {producer}"
