"""Threads that carry out shard jobs, several at a time, the largest first."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from w8a8.checkpoint.stream import Stopped
from w8a8.execute.shard import ShardJob, ShardRecord, quantize_shard


def worker_count() -> int:
    """Give the default number of shards at a time: one per core this process may use, at most 8, enough for a disk."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def carry_out(
    jobs: Sequence[ShardJob],
    workers: int,
    *,
    advance: Callable[[int], None],
    record: Callable[[ShardRecord], None],
) -> None:
    """Carry out all `jobs` on `workers` threads; `record` is told of each finished shard, one at a time.

    Raises the first error of `quantize_shard`; the other jobs stop.
    """
    stop, recording = threading.Event(), threading.Lock()

    def run(job: ShardJob) -> None:
        if stop.is_set():
            raise Stopped
        finished = quantize_shard(job, advance=advance, stopped=stop.is_set)
        with recording:
            record(finished)

    largest_first = sorted(jobs, key=lambda job: -job.shard.size)
    with ThreadPoolExecutor(workers, thread_name_prefix="shard") as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in largest_first]):
                future.result()
        finally:
            stop.set()
