"""Shard jobs as tasks of a Ray cluster, over a folder that all nodes see.

Each attempt at a shard writes a file of its own, beside the folder that becomes OUT. The machine that was given the
command moves what is finished into that folder, and notes it in the journal: nobody else ever touches a file of the
result, be it a node that was given up and still works, or a task of an earlier run.
"""

import glob
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

from w8a8.checkpoint.stream import Identity
from w8a8.cluster import Cluster
from w8a8.errors import SourceChangedError, UnwritableError
from w8a8.execute.shard import ShardJob, ShardRecord, quantize_shard
from w8a8.execute.supply import Supply
from w8a8.execute.workers import Admit, each, in_order, worker_count
from w8a8.storage.writer import disk_errors, write_whole

GROUP_BYTES = 256 << 20
"""Source bytes that a task of small shards has at most: enough that handing it out costs nothing."""
GROUPS_PER_WORKER = 4
"""How many tasks each worker gets at least, where there are so many shards, so that all end at one time."""
ARRIVAL_SECONDS = 60.0
"""How long a node may take to see a file that has arrived: as long as network file systems remember what was there."""

Made = tuple[Path, ShardRecord]
"""A finished attempt: its file, and what it is."""


def spread(
    jobs: Sequence[ShardJob],
    supply: Supply,
    *,
    cluster: Cluster,
    advance: Callable[[int], None],
    record: Callable[[ShardRecord], None],
    admit: Admit = lambda _name, _stopped: None,
    together: bool = True,
    notice: Callable[[str], None] = lambda _: None,
) -> None:
    """Carry out all `jobs` on the nodes of `cluster`, as `supply` brings their files to a folder that all see.

    `record` is told of each finished shard, one at a time; `admit(name, stopped)` waits until a shard may be made.
    `together` says that small shards may be one task: none of them waits for another to leave.
    Raises the first error of `quantize_shard` or `supply`, with the node and the shard, or one of `Cluster.crew` and
    `Crew.call`; the other tasks are cancelled.
    """
    if not jobs:
        return
    # 1) A folder for attempts, which every node has to see, as it has to see the source; nodes are in other folders
    jobs = [replace(job, source=job.source.absolute()) for job in jobs]
    home, arriving = jobs[0].target.parent.parent, supply.room > 0
    attempts = home / "attempts"
    shutil.rmtree(attempts, ignore_errors=True)  # what is still at it has names of its own
    token = attempts / f"token-{uuid4().hex}"
    with disk_errors(attempts):
        attempts.mkdir(exist_ok=True)
    write_whole(token, token.name.encode(), resumable=True)
    files = {token: len(token.name)}
    if not arriving:
        files[jobs[0].source] = jobs[0].shard.stored.size
    # 2) Small shards together, the largest first
    groups = list(grouped(jobs, cluster.slots)) if together else [(job,) for job in in_order(jobs)]
    lock = threading.Lock()
    with cluster.crew(files, attempts, advance=advance, notice=notice) as crew:

        def run(group: Sequence[ShardJob], stopped: Callable[[], bool]) -> None:
            label = group[0].plan.name + (f" and {len(group) - 1} more" if len(group) > 1 else "")
            weight = sum(job.shard.size for job in group)
            with ExitStack() as held:
                for job in group:
                    admit(job.plan.name, stopped)
                    held.enter_context(supply.hold(job.source.name, stopped))
                seen = Identity.of(group[0].source) if arriving else None
                made = crew.call(label, weight, quantize_group, group, attempts, seen, stopped=stopped)
                with lock:
                    for job, (file, shard) in zip(group, made, strict=True):
                        take(file, job, shard)
                        record(shard)

        with supply.running([job.source.name for group in groups for job in group], worker_count()):
            each(groups, run, cluster.handed)
    shutil.rmtree(attempts, ignore_errors=True)


def grouped(jobs: Sequence[ShardJob], workers: int) -> Iterator[tuple[ShardJob, ...]]:
    """Put small shards together, the largest first, so that each worker still gets several tasks."""
    limit = min(GROUP_BYTES, sum(job.shard.size for job in jobs) // (GROUPS_PER_WORKER * workers))
    group: list[ShardJob] = []
    for job in in_order(jobs):
        if group and sum(other.shard.size for other in group) + job.shard.size > limit:
            yield tuple(group)
            group = []
        group.append(job)
    yield tuple(group)


def quantize_group(
    jobs: Sequence[ShardJob], attempts: Path, seen: Identity | None, *, advance: Callable[[int], None]
) -> list[Made]:
    """Carry out `jobs` on this node, each into a new file in the folder `attempts`. `seen` is the source as it arrived.

    Raises what `quantize_shard` raises, and leaves no file then.
    """
    files = [attempts / f"{job.plan.name}.{uuid4().hex}" for job in jobs]
    try:
        if seen:
            _await(jobs[0].source, seen)
        return [
            (file, quantize_shard(replace(job, target=file), advance=advance))
            for job, file in zip(jobs, files, strict=True)
        ]
    except BaseException:
        for file in files:
            with suppress(OSError):
                file.unlink()
        raise


def take(file: Path, job: ShardJob, record: ShardRecord) -> None:
    """Make a finished attempt the shard that it is, and remove all others at it. Raises `UnwritableError`."""
    with disk_errors(job.target):
        if file.stat().st_size != record.size:
            raise UnwritableError(f"{file}: is not the {record.size:,} bytes that a node wrote; is the folder shared?")
        file.rename(job.target)
        for other in file.parent.glob(f"{glob.escape(job.plan.name)}.*"):
            other.unlink(missing_ok=True)


def _await(source: Path, seen: Identity) -> None:
    """Wait until this node sees a file as it arrived, and no more what was in its place before."""
    end = time.monotonic() + ARRIVAL_SECONDS
    while True:
        found = Identity.of(source)
        if (found.inode, found.size, found.mtime_ns) == (seen.inode, seen.size, seen.mtime_ns):
            return
        if time.monotonic() > end:
            raise SourceChangedError(f"{source}: this node does not see the file that arrived; is the folder shared?")
        time.sleep(0.2)
