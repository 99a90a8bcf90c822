"""`w8a8 convert`: a quantized checkpoint in another spelling, or dense again.

Between the spellings of W8A8 no code and no scale changes; to BF16 every tensor is decoded as `quantize` would read it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from w8a8.checkpoint import Source
from w8a8.checkpoint.remote import called
from w8a8.checkpoint.source import is_address
from w8a8.errors import UsageError
from w8a8.formats import FORMATS, get_format
from w8a8.formats.arithmetic import EXACT
from w8a8.formats.provenance import Provenance, ShardFile, SmallFile
from w8a8.plan import Plan
from w8a8.plan.converting import DENSE, dense_plan, dense_view, respelled_plan
from w8a8.sources.arriving import Opened, arrivals
from w8a8.sources.opening import as_stored
from w8a8.sources.view import View, ViewShard
from w8a8.storage.arrivals import Repository

TARGETS = (*FORMATS, DENSE)


@dataclass(frozen=True, slots=True)
class ConvertJob:
    """A conversion before any weight is read. `provenance` is the source's w8a8.json, where it stays true.

    With a `repository`, weights arrive while they are converted.
    """

    source: Source
    view: View
    plan: Plan
    provenance: Provenance | None
    repository: Repository | None = None


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A finished conversion: seconds of wall time; `resumed` shards were done by an earlier run.

    `address` is that of a result that went to a store, whence `out` is not there.
    """

    source: Path
    out: Path
    plan: Plan
    seconds: float
    resumed: int
    address: str = ""


def prepare(source: str | Path, format: str) -> ConvertJob:  # noqa: A002
    """Find, open and plan; reads headers only. Raises `W8A8Error`."""
    if format not in TARGETS:
        raise UsageError(f"unknown format {format!r}; there are {', '.join(TARGETS)}")
    opened = Opened.anywhere(source)
    job = _planned(opened, format)
    if opened.repository and any(_lies_apart(shard) for shard in job.view.shards):
        return _planned(Opened.here(source), format)
    return job


def _planned(opened: Opened, format: str) -> ConvertJob:  # noqa: A002
    found, checkpoint, repository = opened.source, opened.checkpoint, opened.repository
    with called(repository.remote.label, found.path) if repository else nullcontext():
        if format == DENSE:
            view = dense_view(checkpoint)
            plan = dense_plan(view, source=found.name, revision=found.revision)
            return ConvertJob(found, view, plan, None, repository)
        view, fmt = as_stored(checkpoint), get_format(format)
        plan = respelled_plan(view, fmt, source=found.name, revision=found.revision)
        return ConvertJob(found, view, plan, Provenance.read(found.path), repository)


def _lies_apart(shard: ViewShard) -> bool:
    """Whether experts that become one tensor lie in several files, which are needed at once."""
    parts = (part for joined in shard.joined for expert in joined.experts for part in expert)
    return any(part.shard != shard.stored.name for part in parts)


def convert(
    source: str | Path,
    out: str | Path,
    format: str,  # noqa: A002
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> ConvertResult:
    """Write the quantized checkpoint `source` (folder, Hub id, address) into the new folder `out` in another `format`.

    `quark` and `compressed-tensors` spell W8A8: codes and scales stay the same, bit for bit, and `w8a8.json`, where
    there is one, goes along. `bf16` is what any source that can be read holds, not quantized. `out` appears once it is
    whole; an interrupted run goes on when it is called again with the same arguments. Raises `W8A8Error`.
    """
    return run(prepare(source, format), out, overwrite=overwrite, workers=workers, advance=advance, notice=notice)


def run(
    job: ConvertJob,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    arrived: Callable[[int], None] = lambda _: None,
    sent: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> ConvertResult:
    """Carry out a prepared conversion; see `convert`. `arrived` and `sent` are told of bytes that come and go."""
    from w8a8.execute import execute
    from w8a8.execute.delivery import HERE
    from w8a8.execute.target import StoreTarget
    from w8a8.execute.workers import worker_count

    workers = workers or worker_count()
    target = StoreTarget.claim(str(out), overwrite=overwrite, source=job.repository) if is_address(out) else None
    here = target.here if target else Path(out)

    def provenance(shards: Mapping[str, ShardFile], files: Mapping[str, SmallFile]) -> Provenance | None:
        return job.provenance and replace(job.provenance, format=job.plan.format, shards=shards, files=files)

    start = time.perf_counter()
    resumed = execute(
        job.plan,
        job.view,
        here,
        EXACT,
        overwrite=overwrite,
        workers=workers,
        advance=advance,
        notice=notice,
        provenance=provenance,
        arriving=partial(arrivals, job.repository, workers=workers, arrived=arrived) if job.repository else None,
        delivery=target or HERE,
        sent=sent,
    )
    address = target.store.url if target else ""
    return ConvertResult(job.source.path, here, job.plan, time.perf_counter() - start, resumed, address)
