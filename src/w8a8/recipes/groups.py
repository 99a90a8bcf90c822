"""Which activations of a decoder layer can be rescaled without changing what the layer computes.

A group is some linear layers that read the same activations, and the module that makes these: dividing a channel of
the producer's output and multiplying the consumers' columns by the same number changes nothing in real arithmetic. The
architecture's table says which groups there are (`architectures.toml`):

    norm    input_layernorm -> q, k, v     pre-MLP norm -> gate, up     the norm's weight is divided
    linear  up_proj -> down_proj           act(gate) * up is linear in up: up's rows are divided
    value   v_proj -> o_proj               attention is linear in v: v's rows are divided

A key-value head's channels reach `o_proj` once for every query head that shares it. A group without a producer (values
that are normalised, activations that no norm makes) keeps its inputs as they are; its weights can still be rounded
better.

Other modules may read the activations, too: routers, small gates. They stay in the checkpoint's dtype, and their
columns are multiplied like those of the consumers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from w8a8.plan.architectures import Group, architecture_of

__all__ = ["Group", "groups_of"]


def groups_of(config: Mapping[str, Any], layer: nn.Module) -> tuple[Group, ...]:
    """The groups of a decoder layer in the order they run, by the `model_type` in its model's config.json.

    Consumers and readers that the layer does not have are left out. Where the architecture's table has no groups there
    are none: `trace.py` finds them.
    """
    there = {path for path, _ in layer.named_modules()}
    fitted = (
        replace(
            group,
            consumers=tuple(path for path in group.consumers if path in there),
            readers=tuple(path for path in group.readers if path in there),
        )
        for group in architecture_of(config).groups
    )
    return tuple(group for group in fitted if group.consumers)
