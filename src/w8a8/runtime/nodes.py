"""The samples of a layer on the nodes of a Ray cluster: the layer's weights go there once, and then what changes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, TypeVar

import torch
from torch import nn

from w8a8.cluster import Cluster, Crew
from w8a8.runtime.samples import BLOCK, HERE, Hands, Placed

R = TypeVar("R")


@contextmanager
def on_nodes(cluster: Cluster | None, *, gpu: bool, notice: Callable[[str], None]) -> Iterator[Hands]:
    """The nodes of a cluster; where there is none, this machine."""
    if cluster is None:
        yield HERE
        return
    with cluster.crew({}, advance=lambda _: None, notice=notice) as crew:
        yield NodeHands(crew, gpu)


@dataclass(frozen=True, slots=True)
class NodeHands:
    """A crew whose tasks have a block of samples, and a node, each; `gpu`: a GPU of it, too."""

    crew: Crew
    gpu: bool = False
    _layers: "count[int]" = field(default_factory=count)

    @contextmanager
    def placed(self, layer: nn.Module, samples: Iterable[Any]) -> Iterator[Placed]:
        """Send the layer and its samples into Ray's memory, once."""
        import ray

        samples, blocks = iter(samples), []
        while block := [*islice(samples, BLOCK)]:
            blocks.append(ray.put(block))
        yield _PlacedThere(layer, self, next(self._layers), ray.put(layer), blocks)


@dataclass(slots=True)
class _PlacedThere:
    layer: nn.Module
    hands: NodeHands
    number: int
    sent: Any
    blocks: list[Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def changed(self, paths: Iterable[str]) -> None:
        """Send the modules that are others now."""
        import ray

        self.changes |= {path: ray.put(self.layer.get_submodule(path)) for path in paths}

    def each(self, work: Callable[..., R], *args: Any) -> Iterator[R]:
        """Hand the blocks out, some more at a time than there are nodes, and yield what comes back in their order."""
        crew, stop = self.hands.crew, threading.Event()

        def call(number: int) -> R:
            begin = number * BLOCK
            label = f"pass {self.number}, samples {begin} to {begin + BLOCK - 1}"
            given = (self.sent, self.blocks[number], dict(self.changes), work, args)
            found: R = crew.call(label, 0, on_block, *given, stopped=stop.is_set, node=True, gpu=self.hands.gpu)
            return found

        ahead = 2 * len(crew.cluster.names)
        with ThreadPoolExecutor(ahead, thread_name_prefix="samples") as pool:
            try:
                waiting: deque[Future[R]] = deque()
                for number in range(len(self.blocks)):
                    waiting.append(pool.submit(call, number))
                    if len(waiting) == ahead:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                stop.set()


@torch.no_grad()  # type: ignore[untyped-decorator]
def on_block(
    layer: nn.Module,
    block: Iterable[Any],
    changes: dict[str, Any],
    work: Callable[..., R],
    args: tuple[Any, ...],
    *,
    advance: Callable[[int], None],  # noqa: ARG001 - no bytes are counted
) -> R:
    """Do `work` on a node, with the modules of the layer that have changed since it was sent."""
    import ray

    for path, module in changes.items():
        layer.set_submodule(path, ray.get(module))
    return work(layer, iter(block), *args)
