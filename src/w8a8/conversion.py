"""`w8a8 convert`: a quantized checkpoint in another spelling, or dense again.

Between the spellings of W8A8 no code and no scale changes; to BF16 every tensor is decoded as `quantize` would read it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from w8a8.checkpoint import Checkpoint, Source, resolve
from w8a8.errors import UsageError
from w8a8.formats import FORMATS, get_format
from w8a8.formats.arithmetic import EXACT
from w8a8.formats.provenance import Provenance, ShardFile, SmallFile
from w8a8.plan import Plan
from w8a8.plan.converting import DENSE, dense_plan, dense_view, respelled_plan
from w8a8.sources.opening import as_stored
from w8a8.sources.view import View

TARGETS = (*FORMATS, DENSE)


@dataclass(frozen=True, slots=True)
class ConvertJob:
    """A conversion before any weight is read. `provenance` is the source's w8a8.json, where it stays true."""

    source: Source
    view: View
    plan: Plan
    provenance: Provenance | None


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A finished conversion: seconds of wall time; `resumed` shards were done by an earlier run."""

    source: Path
    out: Path
    plan: Plan
    seconds: float
    resumed: int


def prepare(source: str | Path, format: str) -> ConvertJob:  # noqa: A002
    """Find, open and plan; reads headers only. Raises `W8A8Error`."""
    if format not in TARGETS:
        raise UsageError(f"unknown format {format!r}; there are {', '.join(TARGETS)}")
    found = resolve(source)
    checkpoint = Checkpoint.open(found.path)
    if format == DENSE:
        view = dense_view(checkpoint)
        return ConvertJob(found, view, dense_plan(view, source=found.name, revision=found.revision), None)
    view, fmt = as_stored(checkpoint), get_format(format)
    plan = respelled_plan(view, fmt, source=found.name, revision=found.revision)
    return ConvertJob(found, view, plan, Provenance.read(found.path))


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
    """Write the quantized checkpoint `source` (a folder or Hub id) into the new folder `out` in another `format`.

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
    notice: Callable[[str], None] = lambda _: None,
) -> ConvertResult:
    """Carry out a prepared conversion; see `convert`."""
    from w8a8.execute import execute

    def provenance(shards: Mapping[str, ShardFile], files: Mapping[str, SmallFile]) -> Provenance | None:
        return job.provenance and replace(job.provenance, format=job.plan.format, shards=shards, files=files)

    start = time.perf_counter()
    resumed = execute(
        job.plan,
        job.view,
        Path(out),
        EXACT,
        overwrite=overwrite,
        workers=workers,
        advance=advance,
        notice=notice,
        provenance=provenance,
    )
    return ConvertResult(job.source.path, Path(out), job.plan, time.perf_counter() - start, resumed)
