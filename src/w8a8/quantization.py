"""`w8a8 quantize`: a checkpoint in, a W8A8 checkpoint out.

The job as it reads: find the source, open it by its headers, plan, calibrate if a recipe asks for it, execute.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from w8a8.calibrate.request import SAMPLES, TOKENS, Progress, Request, request
from w8a8.checkpoint import Source
from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.source import is_address
from w8a8.errors import MissingExtraError
from w8a8.formats import Format
from w8a8.plan import Plan, make_plan
from w8a8.plan.rotation import rotated
from w8a8.plan.viewing import format_for, view_of
from w8a8.reading import real
from w8a8.recipes import ROTATES
from w8a8.sources.arriving import Opened, arrivals
from w8a8.sources.view import View
from w8a8.storage.arrivals import Repository
from w8a8.version import __version__

if TYPE_CHECKING:
    from w8a8.calibrate.estimate import Estimate
    from w8a8.cluster import NodeWork
    from w8a8.execute.delivery import Delivery
    from w8a8.execute.shard import Finished
    from w8a8.execute.target import StoreTarget

Advance = Callable[[int], None]
Notice = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of a result, besides its source.

    Attributes:
        format: `quark` or `compressed-tensors`: the same codes and scales, spelled differently. Default: `quark`;
            `compressed-tensors` for mixtures of experts.
        compat: reproduce another tool's bits: `quark-0.11`, `quark-0.13` or `llm-compressor-0.14`.
        include: globs over tensor or module names to quantize although the rules would not.
        exclude: globs to leave unquantized; they win over `include`.
        recipe: `rtn` rounds to nearest; `smooth`, `smooth+gptq`, `rotate+smooth+gptq` and `auto` choose scales and
            codes by what they do to a text. Default: `rtn`, and `auto` where `calibration` is given. Needs torch and
            transformers.
        calibration: the text: a file, JSONL, or the name of a data set; default: a small built-in one.
        samples: number of samples of the text, at most.
        tokens: tokens per sample.
        keep_bf16: share by which the result may grow (`2%`) so that the most damaged layers stay in BF16.
    """

    format: str | None = None
    compat: str | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    recipe: str | None = None
    calibration: str | None = None
    samples: int = SAMPLES
    tokens: int = TOKENS
    keep_bf16: str | None = None

    def request(self) -> Request | None:
        """What is asked of calibration; None for `rtn`. Raises `UsageError` where options contradict each other."""
        return request(self.recipe, self.calibration, self.samples, self.tokens, self.keep_bf16, self.compat)


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A finished run. Bytes are of tensors, seconds of wall time, `resumed` shards were done by an earlier run.

    `nodes` says what each node of a cluster did. `address` is that of a result that went to a store, whence `out` is
    not there.
    """

    source: Path
    out: Path
    plan: Plan
    seconds: float
    resumed: int
    nodes: Sequence["NodeWork"] = ()
    address: str = ""

    @property
    def gb_per_second(self) -> float:
        """Source gigabytes (10^9 bytes) per second."""
        return self.plan.bytes_in / 1e9 / max(self.seconds, 1e-9)


@dataclass(frozen=True, slots=True)
class Job:
    """A run before any weight is read. `make` makes the plan, given what calibration adds to it."""

    source: Source
    view: View
    format: Format
    plan: Plan
    make: Callable[..., Plan]
    request: Request | None
    repository: Repository | None = None
    finished: Mapping[str, "Finished"] = field(default_factory=dict)


def prepare(source: str | Path, options: Options = Options(), *, cache: bool = False) -> Job:
    """Find, open and plan; reads headers only.

    A model on the Hub that is not in its cache is downloaded while it is quantized; now, and whole, if `cache` says so,
    or something else has to read its weights before: calibration, or a quantization that keeps shapes in tensors.

    Raises `W8A8Error`.
    """
    # 1) the request has to make sense before anything is downloaded
    asked = options.request()
    # 2) the source, by its headers
    opened = Opened.here(source) if cache or asked else Opened.anywhere(source)
    found = opened.source
    view = view_of(opened.checkpoint, split=options.compat is None)  # no other tool splits stacks
    if asked and asked.recipe.startswith(ROTATES):
        view = rotated(view)
    # 3) the plan
    fmt = format_for(view, options.format, options.compat)
    recipe = asked.recipe if asked else "rtn"
    make = partial(
        make_plan,
        view,
        fmt,
        source=found.name,
        revision=found.revision,
        recipe=recipe,
        include=options.include,
        exclude=options.exclude,
        metadata={
            "w8a8_version": __version__,
            "w8a8_source": found.name + (f"@{found.revision}" if found.revision else ""),
            "w8a8_format": fmt.label,
            "w8a8_recipe": recipe,
        },
    )
    return Job(found, view, fmt, make(), make, asked, opened.repository)


def dry_run(source: str | Path, options: Options = Options()) -> Plan:
    """Say what `quantize` with the same options would do, from headers alone, and before any calibration."""
    return prepare(source, options).plan


def estimated(
    job: Job,
    *,
    progress: Progress = lambda _layers: nullcontext(lambda _: None),
    notice: Notice = lambda _: None,
) -> "Estimate | None":
    """Say what the calibration of a job will take, measured here on a layer of each kind; None without one.

    `progress(layers)` shows how many of these layers are done. Nothing is left behind.
    """
    if job.request is None:
        return None
    with _eval_extra():
        from w8a8.calibrate.estimate import estimated as estimated_
    return estimated_(job.source.name, job.view, job.request, job.make, progress=progress, notice=notice)


def quantize(
    source: str | Path,
    out: str | Path,
    options: Options = Options(),
    *,
    overwrite: bool = False,
    workers: int | None = None,
    hash_source: bool = False,
    cache: bool = False,
    disk_budget: int | None = None,
    delivery: "Delivery | None" = None,
    ray: str | None = None,
    advance: Advance = lambda _: None,
    notice: Notice = lambda _: None,
) -> QuantizeResult:
    """Quantize the checkpoint `source` (a folder, Hub id `org/name[@revision]` or address) into the new folder `out`.

    Weights become INT8 [out, in] with one float32 scale per output channel (amax/127), symmetric, rounded half to
    even; the engine quantizes activations: INT8 per token, dynamic. `out` appears once it is whole; an interrupted run
    goes on when it is called again with the same arguments.

    Args:
        source: the checkpoint to quantize, safetensors, dense or in a quantization that can be read.
        out: the folder to create, or its address in an object store: `s3://bucket/folder`.
        options: format, recipe, and which tensors.
        overwrite: replace `out`, once the new one is whole.
        workers: shards to work on at once; default: one per core, at most 8.
        hash_source: put the SHA-256 of every source file into w8a8.json, so that `verify` can tell it from another;
            that of files in the Hub's cache is known without reading them.
        cache: download a model from the Hub whole, into its cache, before it is quantized.
        disk_budget: bytes of source files to hold while a model is downloaded as it is quantized; default: two shards
            per worker.
        delivery: where the result goes besides, shard by shard, or instead.
        ray: carry the plan out on a Ray cluster: `local` starts one here, `auto` joins the one that this machine
            belongs to, `host:port` that of this head. All nodes have to see `source`, and the folder that `out` is in.
        advance: called with numbers of source bytes as they are done.
        notice: called with sentences for the user.

    Raises:
        W8A8Error: whatever went wrong; `out` is untouched.
    """
    job = prepare(source, options, cache=cache)
    target = in_a_store(job, out, overwrite=overwrite)
    if target:
        delivery, out = target, target.here
    appears = delivery is None or not delivery.departs
    with calibrated(job, out, overwrite=overwrite, appears=appears, workers=workers, ray=ray, notice=notice) as ready:
        result = run(
            ready,
            out,
            overwrite=overwrite,
            workers=workers,
            hash_source=hash_source,
            disk_budget=disk_budget,
            delivery=delivery,
            ray=ray,
            advance=advance,
            notice=notice,
        )
        return replace(result, address=target.store.url) if target else result


def in_a_store(job: Job, out: str | Path, *, overwrite: bool) -> "StoreTarget | None":
    """Claim `out` for this run where it is an address; see `StoreTarget.claim`."""
    if not is_address(out):
        return None
    from w8a8.execute.target import StoreTarget

    return StoreTarget.claim(str(out), overwrite=overwrite, source=job.repository)


@contextmanager
def calibrated(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    appears: bool = True,
    workers: int | None = None,
    ray: str | None = None,
    progress: Progress = lambda _layers: nullcontext(lambda _: None),
    notice: Notice = lambda _: None,
) -> Iterator[Job]:
    """Add to the job what calibration finds, if a recipe asks for any; `run` it before the context ends.

    `appears` says that `out` itself will be made. At the address `ray`, the nodes of a cluster run the samples.
    """
    from w8a8.cluster import connected
    from w8a8.execute.workers import worker_count

    if job.request is None:
        yield job
        return
    with _eval_extra():
        from w8a8.calibrate.run import calibrated as found_
    place = str(real(out))
    with (
        connected(ray, f"calibrating {place}", workers, here=worker_count()) if ray else nullcontext() as cluster,
        found_(
            job.source.name,
            job.view,
            job.request,
            job.make,
            Path(out),
            overwrite=overwrite,
            appears=appears,
            cluster=cluster,
            progress=progress,
            notice=notice,
        ) as found,
    ):
        yield replace(job, plan=found.plan, finished=found.finished)


@contextmanager
def _eval_extra() -> Iterator[None]:
    """Raise MissingExtraError where a package is missing that calibration needs."""
    try:
        yield
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"the package {missing.name} is not installed; --recipe needs it: pip install 'w8a8[eval]'"
        ) from missing


def run(
    job: Job,
    out: str | Path,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    hash_source: bool = False,
    disk_budget: int | None = None,
    delivery: "Delivery | None" = None,
    ray: str | None = None,
    advance: Advance = lambda _: None,
    arrived: Advance = lambda _: None,
    sent: Advance = lambda _: None,
    notice: Notice = lambda _: None,
) -> QuantizeResult:
    """Carry out a prepared job; see `quantize`.

    `arrived` is called with numbers of bytes as they are downloaded, `sent` as they are sent with the `delivery`.
    """
    from w8a8.cluster import connected
    from w8a8.execute import execute
    from w8a8.execute.delivery import HERE
    from w8a8.execute.spread import spread
    from w8a8.execute.workers import worker_count

    for warning in job.plan.warnings:
        notice(f"warning: {warning}")
    if job.repository and isinstance(job.repository.remote, HubFolder):
        job.repository.remote.keep("README.md")  # the card will say its license
    start = time.perf_counter()
    arriving = partial(arrivals, job.repository, budget=disk_budget, arrived=arrived) if job.repository else None
    place = str(real(out))  # one run of it in a cluster, also where machines do not see each other's locks
    with connected(ray, place, workers, here=worker_count()) if ray else nullcontext() as cluster:
        workers = cluster.slots if cluster else workers or worker_count()
        delivery = delivery or HERE
        stays = not job.repository and not delivery.departs
        resumed = execute(
            job.plan,
            job.view,
            Path(out),
            job.format.arithmetic,
            overwrite=overwrite,
            workers=workers,
            advance=advance,
            notice=notice,
            finished=job.finished,
            hash_source=hash_source,
            arriving=partial(arriving, workers=workers) if arriving else None,
            delivery=delivery,
            sent=sent,
            carry=partial(spread, cluster=cluster, together=stays, notice=notice) if cluster else None,
        )
        nodes = cluster.nodes() if cluster else ()
    return QuantizeResult(job.source.path, Path(out), job.plan, time.perf_counter() - start, resumed, nodes)
