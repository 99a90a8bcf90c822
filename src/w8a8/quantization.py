"""`w8a8 quantize`: a checkpoint in, a W8A8 checkpoint out.

The job as it reads: find the source, open it by its headers, plan, execute.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import w8a8
from w8a8.checkpoint import Checkpoint, Source, resolve
from w8a8.formats import Format, get_format
from w8a8.plan import Plan, make_plan


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A finished run. Bytes are of tensors, seconds of wall time, `resumed` shards were done by an earlier run."""

    source: Path
    out: Path
    plan: Plan
    seconds: float
    resumed: int

    @property
    def gb_per_second(self) -> float:
        """Source gigabytes (10^9 bytes) per second."""
        return self.plan.bytes_in / 1e9 / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done, before a weight is read."""

    source: Source
    checkpoint: Checkpoint
    format: Format
    plan: Plan


def prepare(
    source: str | Path,
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    compat: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Job:
    """Find, open and plan; see `quantize` for the arguments."""
    found = resolve(source)
    checkpoint = Checkpoint.open(found.path)
    fmt = get_format(format, compat, checkpoint.config)
    metadata = {"w8a8_version": w8a8.__version__, "w8a8_source": _label(found), "w8a8_format": fmt.label}
    plan = make_plan(
        checkpoint,
        fmt,
        source=found.name,
        revision=found.revision,
        include=include,
        exclude=exclude,
        metadata={**metadata, "w8a8_recipe": "rtn"},
    )
    return Job(found, checkpoint, fmt, plan)


def dry_run(
    source: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    compat: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Plan:
    """Say what `quantize` with the same arguments would do, from headers alone."""
    return prepare(source, format=format, compat=compat, include=include, exclude=exclude).plan


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    compat: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> QuantizeResult:
    """Quantize the checkpoint `source` (a folder or Hub id `org/name[@revision]`) into the new folder `out`.

    Weights become INT8 [out, in] with one float32 scale per output channel (amax/127), symmetric, rounded half to
    even; activations are left to the engine: INT8 per token, dynamic. `format` is `quark` (the default) or
    `compressed-tensors`; `compat` (`quark-0.11`, `quark-0.13`, `llm-compressor-0.14`) reproduces that tool's bits
    instead. `include` and `exclude` are globs over tensor or module names. `workers` shards are worked on at once.
    `advance` is called with numbers of source bytes as they are done, `notice` with sentences for the user.

    An interrupted run is resumed by calling again with the same arguments. Raises `w8a8.W8A8Error`.
    """
    job = prepare(source, format=format, compat=compat, include=include, exclude=exclude)
    return run(job, out, overwrite=overwrite, workers=workers, advance=advance, notice=notice)


def run(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> QuantizeResult:
    """Carry out a prepared job; see `quantize`."""
    from w8a8.execute import execute

    for warning in job.plan.warnings:
        notice(f"warning: {warning}")
    start = time.perf_counter()
    resumed = execute(
        job.plan,
        job.checkpoint,
        Path(out),
        job.format.arithmetic,
        overwrite=overwrite,
        workers=workers,
        advance=advance,
        notice=notice,
    )
    return QuantizeResult(job.checkpoint.path, Path(out), job.plan, time.perf_counter() - start, resumed)


def _label(source: Source) -> str:
    return source.name + (f"@{source.revision}" if source.revision else "")
