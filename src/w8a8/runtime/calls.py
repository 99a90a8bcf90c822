"""What a decoder layer is called with besides its states.

Most arguments are the same for all samples of a length: masks, rotary tables. Some are a sample's own: what layers read
of the tokens themselves, as Gemma's per-layer inputs are, or the embeddings that Zamba reads again. And some models give
all their layers one empty mapping, in which some leave tensors for later ones, as Gemma's shared keys and values are: a
mailbox. What lies in it passes from layer to layer with the states.
"""

import json
from collections import UserDict, defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Kwargs = Mapping[str, Any]
"""Arguments of a layer's `forward` by name, other than the states."""


class Mailbox(UserDict[Any, Any]):
    """A mapping in which layers leave tuples of tensors for later layers."""


@dataclass(frozen=True, slots=True)
class States:
    """What passes from one decoder layer to the next: `hidden` [1, tokens, hidden], and what layers have `left`.

    `left` has the tensors in mailboxes, by names that `filled` understands.
    """

    hidden: Tensor
    left: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """A sample as it enters a layer: its hidden states, and all other arguments, mailboxes `filled`."""

    hidden: Tensor
    kwargs: Kwargs


def noted(calls: Iterable[Kwargs]) -> list[dict[str, Any]]:
    """The arguments that a model called its layers with, which left nothing: an empty mapping is a mailbox of all."""
    boxes: dict[str, Mailbox] = defaultdict(Mailbox)
    return [
        {
            name: boxes[name] if isinstance(value, MutableMapping) and not value else value
            for name, value in kwargs.items()
        }
        for kwargs in calls
    ]


def filled(kwargs: Kwargs, left: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of one call: mailboxes of its own, in which lies what layers before have `left`."""
    made = {name: Mailbox() if isinstance(value, Mailbox) else value for name, value in kwargs.items()}
    places = {name: json.loads(name) for name in left}
    for name in sorted(left, key=lambda name: places[name][2]):
        argument, key, _ = places[name]
        made[argument][key] = (*made[argument].get(key, ()), left[name])
    return made


def left_in(kwargs: Kwargs) -> dict[str, Tensor]:
    """What lies in the mailboxes of a call, by names that are made of the argument's, the key and the place."""
    return {
        json.dumps([name, key, place]): tensor
        for name, box in kwargs.items()
        if isinstance(box, Mailbox)
        for key, tensors in box.items()
        for place, tensor in enumerate(tensors)
    }


def own(kwargs: Kwargs, common: Kwargs) -> dict[str, Tensor]:
    """The arguments of a sample that are not those which its layer has in `common` for all samples of this length.

    Raises ValueError for one that is no tensor.
    """
    found = {name: value for name, value in kwargs.items() if not same(value, common.get(name))}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"its layers read a {name} for each sample, a {type(value).__name__}")
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two arguments hold the same values; anything but tensors counts as the same if it is of one type."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping) and not isinstance(one, Mailbox):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other)
