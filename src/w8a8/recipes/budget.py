"""Choose the groups that stay in BF16 within a budget of bytes."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Damage:
    """The `error` that quantizing a group costs, in any unit that adds up, and the bytes that keeping it costs."""

    error: float
    nbytes: int


def choose_bf16(damages: Mapping[Key, Damage], budget: int) -> tuple[Key, ...]:
    """Choose groups of at most `budget` bytes together: largest error per byte first, each that still fits."""
    chosen = []
    for key in sorted(damages, key=lambda key: damages[key].error / max(damages[key].nbytes, 1), reverse=True):
        if damages[key].error > 0 and damages[key].nbytes <= budget:
            budget -= damages[key].nbytes
            chosen.append(key)
    return tuple(chosen)
