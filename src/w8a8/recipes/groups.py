"""Which activations of a decoder layer can be rescaled without changing what the layer computes.

A group is some linear layers that read the same activations, and the module that makes these: dividing a channel of
the producer's output and multiplying the consumers' columns by the same number changes nothing in real arithmetic. The
architecture's table says which groups there are (`architectures.toml`):

    norm    input_layernorm -> q, k, v     pre-MLP norm -> gate, up     the norm's weight is divided
    linear  up_proj -> down_proj           act(gate) * up is linear in up: up's rows are divided
    value   v_proj -> o_proj               attention is linear in v: v's rows are divided

Each expert of a mixture is such a group by itself, as far as `up_proj` and `down_proj` go; the norm before the experts
makes what all of them read.

A key-value head's channels reach `o_proj` once for every query head that shares it. A group without a producer (values
that are normalised, activations that no norm makes) keeps its inputs as they are; its weights can still be rounded
better.

Other modules may read the activations, too: routers, small gates. They stay in the checkpoint's dtype, and their
columns are multiplied like those of the consumers.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import count, takewhile
from typing import Any

from torch import nn

from w8a8.plan.architectures import EACH, Group, architecture_of, text_section

__all__ = ["Group", "groups_of"]


def groups_of(config: Mapping[str, Any], layer: nn.Module) -> tuple[Group, ...]:
    """The groups of a decoder layer in the order they run, by the `model_type` in its model's config.json.

    Consumers and readers that the layer does not have are left out. A group whose producer is one of each expert's
    layers becomes a group for each expert. Where the architecture's table has no groups there are none: `trace.py`
    finds them.
    """
    there = {path for path, _ in layer.named_modules()}
    groups = architecture_of(config).groups
    if text_section(config).get("clip_qkv"):  # which is no linear function of v
        groups = tuple(replace(each, producer=None, kind=None) if each.kind == "value" else each for each in groups)
    fitted = (_fitted(group, there) for group in _by_expert(groups, there))
    return tuple(group for group in fitted if group.consumers)


def _by_expert(groups: Iterable[Group], there: Collection[str]) -> Iterator[Group]:
    """The groups, with one for each expert in place of one whose producer names them all."""
    for group in groups:
        if group.producer is None or EACH not in group.producer:
            yield group
            continue
        for number, producer in enumerate(_of_each(group.producer, there)):
            consumers = tuple(path.replace(EACH, str(number)) for path in group.consumers)
            yield replace(group, consumers=consumers, producer=producer)


def _fitted(group: Group, there: Collection[str]) -> Group:
    """The group as a layer has it, whose modules are `there`."""
    consumers = tuple(found for path in group.consumers for found in _of_each(path, there))
    return replace(group, consumers=consumers, readers=tuple(path for path in group.readers if path in there))


def _of_each(path: str, there: Collection[str]) -> Iterator[str]:
    """The path, if it is there; for all experts, those of each."""
    if EACH not in path:
        yield from (each for each in (path,) if each in there)
        return
    yield from takewhile(there.__contains__, (path.replace(EACH, str(number)) for number in count()))
