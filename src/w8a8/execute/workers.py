"""Threads that carry out shard jobs, several at a time, the largest first."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Protocol, TypeVar

from w8a8.checkpoint.stream import ArrivedWrong, Feed, Stopped
from w8a8.execute.shard import ShardJob, ShardRecord, quantize_shard
from w8a8.execute.supply import Supply
from w8a8.machine import usable_cores

T = TypeVar("T")

Admit = Callable[[str, Callable[[], bool]], None]
"""`admit(name, stopped)` waits until a shard may be made."""


def worker_count() -> int:
    """Give the default number of shards at a time: one per core this process may use, at most 8, enough for a disk."""
    return min(8, usable_cores())


class CarryOut(Protocol):
    """What carries shard jobs out: threads of this process, or a cluster (`spread`)."""

    def __call__(
        self,
        jobs: Sequence[ShardJob],
        supply: Supply,
        *,
        advance: Callable[[int], None],
        record: Callable[[ShardRecord], None],
        admit: Admit = ...,
    ) -> None:
        """Carry out all `jobs`; see `carry_out`."""


def carry_out(
    jobs: Sequence[ShardJob],
    supply: Supply,
    *,
    workers: int,
    advance: Callable[[int], None],
    record: Callable[[ShardRecord], None],
    admit: Admit = lambda _name, _stopped: None,
) -> None:
    """Carry out all `jobs` on `workers` threads, as `supply` brings their files.

    A shard is quantized while its file arrives; what came wrong comes again, and its shard is made again. `record` is
    told of each finished shard, one at a time, when its source is known to be right. Raises the first error of
    `quantize_shard`, `admit` or `supply`; the other jobs stop.
    """
    recording = threading.Lock()

    def run(job: ShardJob, stopped: Callable[[], bool]) -> None:
        def make(feed: Feed, count: Callable[[int], None]) -> None:
            finished = quantize_shard(job, advance=count, stopped=stopped, feed=feed)
            feed.wait()
            with recording:
                record(finished)

        admit(job.plan.name, stopped)
        while_arriving(supply, job.source.name, make, advance=advance, stopped=stopped)

    ordered = in_order(jobs)
    with supply.running([job.source.name for job in ordered], workers):
        each(ordered, run, workers)


def while_arriving(
    supply: Supply,
    name: str,
    work: Callable[[Feed, Callable[[int], None]], T],
    *,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> T:
    """Do `work(feed, advance)` on a file while it arrives, and again where it came wrong; return what it gives.

    What it gives counts only once the feed is whole, for which `work` waits at its end. Raises what it raises.
    """
    while True:
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            advance(nbytes)

        try:
            with supply.feed(name, stopped) as feed:
                return work(feed, count)
        except ArrivedWrong:
            advance(-done)


def in_order(jobs: Iterable[ShardJob]) -> list[ShardJob]:
    """The largest file first; the parts of a file one after the other, since it may leave behind the last one."""
    return sorted(jobs, key=lambda job: (-job.shard.stored.size, job.source.name, -job.shard.size))


def each(items: Iterable[T], work: Callable[[T, Callable[[], bool]], None], workers: int) -> None:
    """Do `work(item, stopped)` for all `items` on `workers` threads. Raises its first error; the others stop."""
    stop = threading.Event()

    def run(item: T) -> None:
        if stop.is_set():
            raise Stopped
        work(item, stop.is_set)

    with ThreadPoolExecutor(workers, thread_name_prefix="shard") as pool:
        try:
            for future in as_completed([pool.submit(run, item) for item in items]):
                future.result()
        finally:
            stop.set()
