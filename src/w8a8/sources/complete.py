"""Whether a checkpoint holds all that it should: every expert of a layer, and each tensor once."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from w8a8.errors import DuplicateTensorError, SourceError
from w8a8.formats.detect import section
from w8a8.sources.view import LogicalTensor

_EXPERT = re.compile(r"(.*\bexperts)\.(\d{1,6})\.(.+)")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_ZERO = "zero_expert_num"
"""How many experts behind those counted give back what they read (LongCat Flash): any weights they have are unused."""


def check(tensors: Iterable[LogicalTensor], config: Mapping[str, Any], where: str) -> None:
    """Check the `tensors` of the checkpoint at `where`.

    Raises `DuplicateTensorError` where two stored tensors make one, and `SourceError` where a layer that has experts
    lacks one, or one of its tensors: by their numbers, by what the others have, by the config's number of experts.
    """
    experts: dict[str, dict[int, set[str]]] = defaultdict(dict)
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise DuplicateTensorError(f"{where}: {tensor.name} is there as it is, and quantized; remove one of them")
        seen.add(tensor.name)
        if found := _EXPERT.fullmatch(tensor.name):
            layer, number, leaf = found.groups()
            experts[layer].setdefault(int(number), set()).add(leaf)
    stated = _stated(config, *_COUNTS)
    for layer, own in experts.items():
        leaves = set[str]().union(*own.values())
        count = stated if stated and _stated(config, _ZERO) else max(stated, *(n + 1 for n in own))
        for number in range(count):
            if lacking := leaves - own.get(number, set()):
                missing = f"{layer}.{number}.{min(lacking)}"
                raise SourceError(f"{where}: {missing} is missing, which other experts have; download it again")


def _stated(config: Mapping[str, Any], *keys: str) -> int:
    """The smallest number that a config states by one of the `keys`; 0 where it states none."""
    places = (config, section(config, "text_config"))
    return min((place[key] for place in places for key in keys if type(place.get(key)) is int), default=0)
