"""What bounds a run: a model of its time from the speeds of its parts. Pure.

Every part of a run takes some of the processor's time per byte, which the cores of a node share. A shard is the work of
one thread that quantizes, hashes and writes, and of one that reads, so few shards on many cores leave cores idle. The
disk and the network have speeds of their own. What comes from the Hub, or goes there, passes through the one machine
that was given the command. Nothing waits for anything else: the largest of these times is the run's, behind the time
that a process takes to start.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

SHARD_BYTES = 5_000_000_000
"""The usual size of a published shard."""
NODES = (1, 2, 4, 8, 16, 32, 64)
SIZES = {"31B": 31e9, "235B": 235e9, "671B": 671e9, "1T": 1e12}
"""Parameters."""

HUB, FOLDER = "Hub to Hub", "folder to folder"


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes a second. Of one core: `read` from the page cache, `sha256`, `bf16` and `fp8` (quantizing, bytes of the
    source), `write`, `arrive` (HTTP, SHA-256 and writing). Of a node: `disk_read`, `disk_write`, and `network`, each
    way. `start` is in seconds.
    """

    read: float
    sha256: float
    bf16: float
    fp8: float
    write: float
    arrive: float
    disk_read: float
    disk_write: float
    network: float
    start: float


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: bytes of the source and of the result, in how many shards, and from where to where.

    `way` is one of `HUB` and `FOLDER`. `cached`: the source is in the page cache.
    """

    source: float
    result: float
    shards: int
    fp8: bool = False
    way: str = FOLDER
    cached: bool = False


def bounds(work: Work, speeds: Speeds, *, nodes: int, cores: int, workers: int) -> Mapping[str, float]:
    """The seconds that each part would take alone, by its name; `workers` shards at a time on each of the `nodes`."""
    share = work.result / work.source
    making = 1 / (speeds.fp8 if work.fp8 else speeds.bf16) + share * (1 / speeds.sha256 + 1 / speeds.write)
    reading, moving = 1 / speeds.read, 0.0
    disk = work.result / speeds.disk_write + (0.0 if work.cached else work.source / speeds.disk_read)
    found = {}
    if work.way == HUB:
        moving = 1 / speeds.arrive + share / speeds.read
        disk = (work.source + work.result) / speeds.disk_write  # the page cache gives back what has just been written
        found["network"] = max(work.source, work.result) / speeds.network
    rounds = math.ceil(work.shards / (nodes * workers))
    return found | {
        "cores": work.source * max(moving, (making + reading + moving) / nodes) / cores,
        "shards": rounds * work.source / work.shards * max(making, reading),
        "disk": disk / nodes,
    }


@dataclass(frozen=True, slots=True)
class Forecast:
    """The model's word on one run: seconds, and what bounds it."""

    size: str
    source: str
    way: str
    nodes: int
    seconds: float
    bound: str


def forecast(work: Work, speeds: Speeds, *, nodes: int = 1, cores: int, workers: int) -> tuple[float, str]:
    """The seconds of a whole run, and the part that takes longest."""
    found = bounds(work, speeds, nodes=nodes, cores=cores, workers=workers)
    bound = max(found, key=found.__getitem__)
    return speeds.start + found[bound], bound


def forecasts(speeds: Speeds, cores: int, workers: int) -> Iterator[Forecast]:
    """The model's word on all `SIZES` and `NODES`, for both ways, from BF16 and FP8."""
    for way in (HUB, FOLDER):
        for size, parameters in SIZES.items():
            for source, nbytes in (("BF16", 2), ("FP8", 1)):
                shards = math.ceil(parameters * nbytes / SHARD_BYTES)
                work = Work(parameters * nbytes, parameters, shards, source == "FP8", way)
                for nodes in NODES:
                    seconds, bound = forecast(work, speeds, nodes=nodes, cores=cores, workers=workers)
                    yield Forecast(size, source, way, nodes, seconds, bound)
