"""Work on a layer's samples, block by block: on this machine one after the other, or wherever `Hands` has it done.

A sum over samples is made within each block, then over the blocks in their order, so that it is the same wherever the
blocks are.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, Protocol, TypeVar

from torch import nn

T = TypeVar("T")
R = TypeVar("R")

BLOCK = 4
"""Samples in a block."""


class Placed(Protocol):
    """A layer and samples, where work on them is done. `layer` may be changed, if `changed` is told of it."""

    @property
    def layer(self) -> nn.Module:
        """The layer as it is on this machine."""

    def changed(self, paths: Iterable[str]) -> None:
        """Modules of the layer, by their paths, are others now."""

    def each(self, work: Callable[..., R], *args: Any) -> Iterator[R]:
        """Do `work(layer, block, *args)` for every block of samples, and yield the results in the blocks' order.

        A block is an iterable that can be read once. `work` is a function of a module; it leaves the layer as it is.
        """


class Hands(Protocol):
    """What does the work of a layer's samples."""

    def placed(self, layer: nn.Module, samples: Iterable[Any]) -> AbstractContextManager[Placed]:
        """Place a layer and its samples, for as long as the context lasts."""


@dataclass(frozen=True, slots=True)
class _PlacedHere(Generic[T]):
    layer: nn.Module
    samples: Iterable[T]

    def changed(self, _paths: Iterable[str]) -> None:
        """The layer is this one."""

    def each(self, work: Callable[..., R], *args: Any) -> Iterator[R]:
        """Do the work here; one sample is in memory at a time."""
        samples = iter(self.samples)
        for first in samples:
            yield work(self.layer, chain([first], islice(samples, BLOCK - 1)), *args)


class _Here:
    """This machine."""

    @contextmanager
    def placed(self, layer: nn.Module, samples: Iterable[Any]) -> Iterator[Placed]:
        """Everything is here."""
        yield _PlacedHere(layer, samples)


HERE = _Here()
