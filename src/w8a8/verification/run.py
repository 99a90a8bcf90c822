"""`w8a8 verify`: is this W8A8 checkpoint what it should be, given its source?

The structure is compared first, from headers: every source tensor accounted for, nothing else there, config and index
in agreement. Then every byte is: the source is streamed as in quantizing, and each block is compared with its
counterpart. Copies must be identical. Codes times scale must lie where rounding to nearest leaves them: within half a
scale for this project's own arithmetic, within one and a half for tools that clip and round their scales.

Of what w8a8.json says was calibrated, weights must be their source but for factors of whole rows and columns, and those
factors must be the ones that the norms before them ask for (`folds.py`).
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import numpy as np

from w8a8.checkpoint import Shard
from w8a8.checkpoint.stream import Feed, file_sha256, read_exactly, stream
from w8a8.cluster import Cluster, connected
from w8a8.execute.supply import Local, Supply
from w8a8.execute.workers import each, while_arriving, worker_count
from w8a8.formats.provenance import PROVENANCE
from w8a8.reading import reading, real, show
from w8a8.sources.arriving import arrivals
from w8a8.sources.blocks import shard_blocks
from w8a8.sources.rows import RowReader, read_values
from w8a8.sources.view import ViewShard
from w8a8.storage.writer import disk_errors
from w8a8.verification import folds
from w8a8.verification.job import Job, prepare
from w8a8.verification.result import VerifyResult
from w8a8.verification.structure import bookkeeping_problems, exclude_warnings, structure_problems
from w8a8.verification.tallies import Comparison, tally

Advance = Callable[[int], None]
Stop = Callable[[], bool]

__all__ = ["Job", "prepare", "run", "verify"]


def verify(
    out: str | Path,
    source: str | Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    advance: Advance = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> VerifyResult:
    """Compare the W8A8 checkpoint `out` (by this tool or another, quark or compressed-tensors) with its `source`.

    `ray` is the address of a Ray cluster to do it on (`local`, `auto`, `host:port`), whose nodes see both; `notice` is
    told of what was lost there. Raises `W8A8Error` where either does not open; anything found wrong inside is in the
    result's `problems`.
    """
    return run(prepare(out, source, here=ray is not None), workers=workers, ray=ray, advance=advance, notice=notice)


def run(
    job: Job,
    *,
    workers: int | None = None,
    ray: str | None = None,
    advance: Advance = lambda _: None,
    arrived: Advance = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> VerifyResult:
    """Carry out a prepared job; see `verify`. `arrived` is told of bytes of the source as they are downloaded."""
    problems, warnings = list(structure_problems(job)), list(exclude_warnings(job))
    # What another tool chose to write differently is worth a word; in our own output it is a sign of tampering.
    (problems if job.provenance is not None else warnings).extend(bookkeeping_problems(job))
    name = f"verifying {job.out.path} {uuid4().hex}"
    with (
        _brought(job, workers or worker_count(), arrived) as (job, supply),
        connected(ray, name, workers, here=worker_count()) if ray else nullcontext() as cluster,
    ):
        with _on(cluster, job, advance, notice) if cluster else nullcontext(partial(_here, job)) as do:
            workers = cluster.handed if cluster else workers or worker_count()
            comparison = _compare_bytes(job, supply, do, workers, advance)
        nodes = cluster.nodes() if cluster else ()
        problems += comparison.problems
        problems += _fold_problems(job, comparison.factors)
    tensors = sorted(comparison.errors, key=lambda t: (t.sqnr_db, t.name))
    return VerifyResult(
        tuple(problems),
        tuple(warnings),
        tuple(tensors),
        comparison.copied,
        comparison.checksums,
        comparison.folded,
        nodes,
    )


@dataclass(frozen=True, slots=True)
class _Task:
    """`work(job, of, advance=, stopped=)` compares something; it reads `weight` bytes of the source's `file`."""

    work: Callable[..., Comparison]
    of: ViewShard | Shard | str
    label: str
    weight: int = 0
    file: str = ""


Do = Callable[[_Task, Feed | None, Advance, Stop], Comparison]
"""Does a task on a file of the source, which may be arriving."""


def _here(job: Job, task: _Task, feed: Feed | None, advance: Advance, stopped: Stop) -> Comparison:
    """Do a task on this thread."""
    return task.work(job, task.of, feed=feed, advance=advance, stopped=stopped)


@contextmanager
def _on(cluster: Cluster, job: Job, advance: Advance, notice: Callable[[str], None]) -> Iterator[Do]:
    """Do tasks on the nodes of a cluster, to which the job is sent once."""
    import ray

    source = replace(job.source.checkpoint, path=job.source.path.absolute(), gguf=None)  # only its bytes are read there
    out = replace(job.out, path=job.out.path.absolute())
    there = replace(job, source=replace(job.source, checkpoint=source), out=out)
    files = {source.path / shard.stored.name: shard.stored.size for shard in job.source.shards[:1]}
    files |= {out.path / shard.name: shard.size for shard in out.shards[:1]}
    sent = ray.put(there)
    with cluster.crew(files, advance=advance, notice=notice) as crew:
        yield lambda task, _feed, _advance, stopped: crew.call(
            task.label, task.weight, task.work, sent, task.of, stopped=stopped
        )


@contextmanager
def _brought(job: Job, workers: int, arrived: Advance) -> Iterator[tuple[Job, Supply]]:
    """Where the source's weights are far away, have them arrive in a folder beside the result's, which then leaves."""
    if job.repository is None:
        yield job, Local(job.source.checkpoint)
        return
    home = real(job.out.path)
    with disk_errors(home):
        folder = TemporaryDirectory(prefix=f".{home.name}.w8a8-verify-", dir=home.parent)
    with folder:
        norms = tuple(fold.before.stored for fold in job.folds())
        supply = arrivals(job.repository, job.source, Path(folder.name), workers=workers, also=norms, arrived=arrived)
        yield replace(job, source=replace(job.source, checkpoint=supply.checkpoint())), supply


def _compare_bytes(job: Job, supply: Supply, do: Do, workers: int, advance: Advance) -> Comparison:
    found, adding = Comparison([], []), threading.Lock()
    sizes = {shard.name: shard.size for shard in job.source.checkpoint.shards}
    tasks = [_Task(_compare_shard, s, s.name, s.size, s.stored.name) for s in job.source.shards]
    if job.provenance is not None:
        parts = job.provenance.source.sha256.keys() - {s.stored.name for s in job.source.shards if s.whole}
        tasks += [_Task(_check_sum, shard, f"checksum of {shard.name}") for shard in job.out.shards]
        for name in sorted(parts):
            tasks.append(
                _Task(_check_source, name, f"checksum of the source's {name}", file=name if name in sizes else "")
            )
    # The largest files of the source first, and all of a file together, since it may leave behind the last one.
    tasks.sort(key=lambda task: (-sizes.get(task.file, 0), task.file, -task.weight))

    def run(task: _Task, stopped: Stop) -> None:
        def compare(feed: Feed, count: Advance) -> Comparison:
            seen = do(task, feed, count, stopped)
            feed.wait()
            return seen

        if task.file:
            other = while_arriving(supply, task.file, compare, advance=advance, stopped=stopped)
        else:
            other = do(task, None, advance, stopped)
        with adding:
            found.add(other)

    with supply.running([task.file for task in tasks if task.file], workers):
        each(tasks, run, workers)
    found.problems.sort()
    return found


def _check_sum(job: Job, shard: Shard, *, stopped: Stop = lambda: False, **_: object) -> Comparison:
    """Compare one shard of the result with its checksum in w8a8.json."""
    recorded = job.provenance.shards.get(shard.name) if job.provenance else None
    if recorded is not None and file_sha256(job.out.path / shard.name, stopped) == recorded.sha256:
        return Comparison([], [], checksums=1)
    return Comparison([f"{shard.name}: is not the file that was written (SHA-256 differs from {PROVENANCE})"], [])


def _check_source(
    job: Job, name: str, *, feed: Feed | None = None, stopped: Stop = lambda: False, **_: object
) -> Comparison:
    """Compare a source file of which no shard is made from all with its checksum in w8a8.json."""
    there = any(shard.name == name for shard in job.source.checkpoint.shards)
    feed = feed or Feed(job.source.path / name)
    feed.wait()
    return _source_sum(job, name, file_sha256(feed.path, stopped) if there else "")


def _source_sum(job: Job, name: str, sha256: str) -> Comparison:
    if job.provenance and sha256 == job.provenance.source.sha256.get(name):
        return Comparison([], [], checksums=1)
    return Comparison([f"source {show(name)}: is not the file this was made from (SHA-256 differs)"], [])


def _compare_shard(
    job: Job,
    shard: ViewShard,
    *,
    feed: Feed | None = None,
    advance: Advance = lambda _: None,
    stopped: Stop = lambda: False,
) -> Comparison:
    """Compare one source shard, block by block, with its tensors wherever they are in the result."""
    found, feed = Comparison([], []), feed or Feed(job.source.path / shard.stored.name)
    known = job.provenance is not None and shard.stored.name in job.provenance.source.sha256
    digest = hashlib.sha256() if known and shard.whole else None
    tallies = {t.name: held for t in shard.tensors if (held := tally(t, job)) is not None}
    files: dict[str, int] = {}
    buffer, reader = memoryview(bytearray(1)), RowReader(job.source.path, {shard.stored.name: feed})
    try:
        with closing(stream(feed, shard_blocks(shard), stopped, digest)) as blocks:
            for block, data in blocks:
                held = tallies.get(block.tensor.name) if block.tensor is not None else None
                if held is not None:
                    size = held.made.nbytes // held.made.numel
                    nbytes = block.numel * size
                    buffer = buffer if len(buffer) >= nbytes else memoryview(bytearray(nbytes))
                    path = job.out.path / held.made.shard
                    if held.made.shard not in files:
                        with reading(path):
                            files[held.made.shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    read_exactly(files[held.made.shard], buffer[:nbytes], held.made.offset + block.at * size, path)
                    held.compare(reader.content(block, data), buffer[:nbytes], block.begin)
                if block.hashed:
                    advance(block.nbytes)
    finally:
        for fd in files.values():
            os.close(fd)
    for held in tallies.values():
        held.conclude(found, job)
    if digest is not None:
        found.add(_source_sum(job, shard.stored.name, digest.hexdigest()))
    return found


def _fold_problems(job: Job, factors: Mapping[str, tuple[folds.Floats, folds.Floats]]) -> Iterator[str]:
    """Name the weights whose fold the norm before them does not undo."""
    for fold in job.folds():
        before = RowReader(job.source.path).values(fold.before).reshape(-1)
        after = read_values(job.out, fold.after)
        for name in fold.readers:
            columns, energy = factors.get(name, (np.ones(len(before)), np.ones(len(before))))
            if (
                len(columns) != len(before)
                or folds.misfit(columns, energy, before, after, fold.offset) > folds.MAX_MISFIT
            ):
                yield f"{name}: what was folded into it is not what was taken out of {fold.before.name}"
