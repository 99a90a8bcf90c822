"""A source that need not be here: opened by its headers, and its files brought while they are worked on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from w8a8.checkpoint import Checkpoint, Source, TensorSpec, resolve
from w8a8.checkpoint.finding import remote
from w8a8.sources import nf4
from w8a8.sources.view import View
from w8a8.storage.arrivals import Arrivals, Repository


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint, open by its headers, and where it was found; with a `repository`, its weights are far away."""

    source: Source
    checkpoint: Checkpoint
    repository: Repository | None = None

    @classmethod
    def here(cls, source: str | Path) -> Self:
        """Have all of it here, in the Hub's cache if need be. Raises what `resolve` and `Checkpoint.open` raise."""
        found = resolve(source)
        return cls(found, Checkpoint.open(found.path))

    @classmethod
    def anywhere(cls, source: str | Path) -> Self:
        """Leave weights where they are, unless a quantization keeps shapes in tensors; see `remote`."""
        far = remote(source)
        repository = Repository.open(far) if far else None
        if repository is None or nf4.is_here(repository.checkpoint.tensors):
            return cls.here(source)
        path = repository.checkpoint.path
        return cls(Source(path, repository.remote.name, repository.remote.revision), repository.checkpoint, repository)


def arrivals(
    repository: Repository,
    view: View,
    folder: Path,
    *,
    budget: int | None = None,
    workers: int,
    also: tuple[TensorSpec, ...] = (),
    arrived: Callable[[int], None] = lambda _: None,
) -> Arrivals:
    """What brings the shards of a view into a folder, within `budget` bytes, by default two shards per worker.

    Tensors that belong to others in another shard are there from the start, and those in `also`.
    """
    files = {shard.stored.name: shard.stored.size for shard in view.shards}
    beside = {
        spec: None
        for shard in view.shards
        for tensor in shard.tensors
        for spec in tensor.beside
        if spec.shard != shard.stored.name
    }
    budget = budget or 2 * workers * max(files.values())
    return Arrivals(repository, folder, budget=budget, beside=[*{**beside, **dict.fromkeys(also)}], arrived=arrived)
