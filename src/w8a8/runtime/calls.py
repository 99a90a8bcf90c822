"""What a decoder layer is called with besides its states, and what it leaves besides them.

Most arguments are the same for all samples of a length: masks, rotary tables. Some are a sample's own: what layers read
of the tokens themselves, as Gemma's per-layer inputs are, or the embeddings that Zamba reads again. And some come from
layers before:

    mailbox  one empty mapping is given to all layers, and some leave tensors in it, as Gemma's shared keys and values
    passed   a layer returns more than its states, and the next one is given it, as the tokens that GLM attends to

What is left for later layers passes from layer to layer with the states.
"""

import json
from collections import UserDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Kwargs = Mapping[str, Any]
"""Arguments of a layer's `forward` by name, other than the states."""


class Mailbox(UserDict[Any, Any]):
    """A mapping in which layers leave tuples of tensors for later layers."""


@dataclass(frozen=True, slots=True)
class Passed:
    """In the place of an argument: what the layer before returns at this `place` behind its states."""

    place: int


@dataclass(frozen=True, slots=True)
class States:
    """What passes from one decoder layer to the next: `hidden` [1, tokens, hidden], and what layers have `left`.

    `left` has tensors in mailboxes, and those that the last layer has passed, by names that `filled` understands.
    """

    hidden: Tensor
    left: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """A sample as it enters a layer: its `states`, and the other arguments, which are to be `filled`."""

    states: States
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
    """The arguments of one call, in which what layers before have `left` is in its places: mailboxes are its own."""
    made = {name: Mailbox() if isinstance(value, Mailbox) else value for name, value in kwargs.items()}
    made |= {name: left.get(json.dumps(value.place)) for name, value in made.items() if isinstance(value, Passed)}
    posted = {name: place for name in left if isinstance(place := json.loads(name), list)}
    for name in sorted(posted, key=lambda name: posted[name][2]):
        argument, key, _ = posted[name]
        made[argument][key] = (*made[argument].get(key, ()), left[name])
    return made


def left_by(output: Any, kwargs: Kwargs) -> dict[str, Tensor]:
    """What a layer has left for later ones: in the mailboxes of its arguments, and behind the states it returned.

    Names are made of the argument's name, the key and the place in a mailbox, or are the place behind the states.
    """
    posted = {
        json.dumps([name, key, place]): tensor
        for name, box in kwargs.items()
        if isinstance(box, Mailbox)
        for key, tensors in box.items()
        for place, tensor in enumerate(tensors)
    }
    more = output[1:] if isinstance(output, tuple | list) else ()
    return posted | {json.dumps(place): each for place, each in enumerate(more, 1) if isinstance(each, Tensor)}


def own(kwargs: Kwargs, common: Kwargs) -> dict[str, Tensor]:
    """The arguments of a sample that are not those which its layer has in `common` for all samples of this length.

    Raises TypeError for one that is no tensor.
    """
    found = {name: value for name, value in kwargs.items() if not same(value, common.get(name))}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"its layers read a {name} for each sample, a {type(value).__name__}")
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


class _StopForward(Exception):  # noqa: N818 - no error, like StopIteration
    """Stops a forward pass at the module whose arguments are wanted."""


def arguments_of(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...] | None:
    """Return what `module` is given first when `run` runs, which stops there; None if it is given nothing."""
    found: list[tuple[Any, ...]] = []

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments)
        raise _StopForward

    with module.register_forward_pre_hook(keep), suppress(_StopForward):
        run()
    return found[0] if found else None
