"""Which groups stay in BF16 where a budget of bytes allows some to."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Damage:
    """What a group's quantization costs in quality, in any unit that adds up, and what its staying costs in bytes."""

    error: float
    nbytes: int


def choose_bf16(damages: Mapping[Key, Damage], budget: int) -> tuple[Key, ...]:
    """The groups that stay, together at most `budget` bytes: by damage per byte, each that still fits."""
    chosen = []
    for key in sorted(damages, key=lambda key: damages[key].error / max(damages[key].nbytes, 1), reverse=True):
        if damages[key].error > 0 and damages[key].nbytes <= budget:
            budget -= damages[key].nbytes
            chosen.append(key)
    return tuple(chosen)
