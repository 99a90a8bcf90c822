"""`w8a8 quantize`: a checkpoint in, a W8A8 checkpoint out.

The job as it reads: find the source, open it by its headers, plan, calibrate if a recipe wants it, execute.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8.calibrate.request import SAMPLES, TOKENS, Request, request
from w8a8.checkpoint import Checkpoint, Source, resolve
from w8a8.errors import MissingExtraError
from w8a8.formats import Format, get_format
from w8a8.plan import Plan, make_plan
from w8a8.version import __version__

if TYPE_CHECKING:
    from w8a8.execute.shard import Finished

Progress = Callable[[int], AbstractContextManager[Callable[[int], None]]]


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
    """What is to be done, before a weight is read. `make` makes the plan, given what calibration adds to it."""

    source: Source
    checkpoint: Checkpoint
    format: Format
    plan: Plan
    make: Callable[..., Plan]
    request: Request | None
    finished: Mapping[str, "Finished"] = field(default_factory=dict)


def prepare(
    source: str | Path,
    *,
    format: str | None = None,  # noqa: A002 - the option's name
    compat: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    recipe: str | None = None,
    calibration: str | None = None,
    samples: int = SAMPLES,
    tokens: int = TOKENS,
    keep_bf16: str | None = None,
) -> Job:
    """Find, open and plan; see `quantize` for the arguments."""
    asked = request(recipe, calibration, samples, tokens, keep_bf16, compat)
    found = resolve(source)
    checkpoint = Checkpoint.open(found.path)
    fmt = get_format(format, compat, checkpoint.config)
    metadata = {"w8a8_version": __version__, "w8a8_source": _label(found), "w8a8_format": fmt.label}
    name = asked.recipe if asked else "rtn"
    make = partial(
        make_plan,
        checkpoint,
        fmt,
        source=found.name,
        revision=found.revision,
        recipe=name,
        include=include,
        exclude=exclude,
        metadata={**metadata, "w8a8_recipe": name},
    )
    return Job(found, checkpoint, fmt, make(), make, asked)


def dry_run(source: str | Path, **options: Any) -> Plan:
    """Say what `quantize` with the same options would do, from headers alone, and before any calibration."""
    return prepare(source, **options).plan


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    format: str | None = None,  # noqa: A002
    compat: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    recipe: str | None = None,
    calibration: str | None = None,
    samples: int = SAMPLES,
    tokens: int = TOKENS,
    keep_bf16: str | None = None,
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

    A `recipe` other than `rtn` (`smooth`, `smooth+gptq`, `auto`) chooses scales and codes by what they do to `samples`
    of `tokens` tokens of the text `calibration`: a file, JSONL, or the name of a data set, by default a small built-in
    text. With a text, `auto` is the default. `keep_bf16`, as in `2%`, is the share by which the result may grow for
    layers that lose most to be left as they are. This needs torch and transformers.

    An interrupted run is resumed by calling again with the same arguments. Raises `w8a8.W8A8Error`.
    """
    job = prepare(
        source,
        format=format,
        compat=compat,
        include=include,
        exclude=exclude,
        recipe=recipe,
        calibration=calibration,
        samples=samples,
        tokens=tokens,
        keep_bf16=keep_bf16,
    )
    with calibrated(job, out, overwrite=overwrite, notice=notice) as ready:
        return run(ready, out, overwrite=overwrite, workers=workers, advance=advance, notice=notice)


@contextmanager
def _unshown(_layers: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


@contextmanager
def calibrated(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = _unshown,
    notice: Callable[[str], None] = lambda _: None,
) -> Iterator[Job]:
    """The job with what calibration adds to it, if a recipe wants any; `run` it before the context ends.

    `progress(layers)` gives a context, whose value is called with numbers of layers as they are done.
    """
    if job.request is None:
        yield job
        return
    try:
        from w8a8.calibrate.run import calibrated as found_
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"the package {missing.name} is not installed; --recipe needs it: pip install 'w8a8[eval]'"
        ) from missing
    with found_(
        job.source.name,
        job.checkpoint,
        job.request,
        job.make,
        Path(out),
        overwrite=overwrite,
        progress=progress,
        notice=notice,
    ) as found:
        yield replace(job, plan=found.plan, finished=found.finished)


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
        finished=job.finished,
    )
    return QuantizeResult(job.checkpoint.path, Path(out), job.plan, time.perf_counter() - start, resumed)


def _label(source: Source) -> str:
    return source.name + (f"@{source.revision}" if source.revision else "")
