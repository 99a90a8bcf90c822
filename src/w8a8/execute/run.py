"""`execute`: a plan and its source folder in, a published checkpoint out.

Shards are independent, so they run side by side, the largest first. Each finished one is noted in the journal, and sent
where the result goes besides; the small files follow; then the whole folder is opened again as any reader would, and
only then made visible there, and renamed to OUT.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from w8a8.checkpoint import Checkpoint
from w8a8.checkpoint.reader import INDEX, inside
from w8a8.checkpoint.stream import BLOCK_BYTES, Identity, file_sha256
from w8a8.errors import (
    DiskFullError,
    NonFiniteWeightError,
    SelfCheckError,
    SourceChangedError,
    SourceError,
    UsageError,
    W8A8Error,
)
from w8a8.execute.delivery import HERE, Delivery, Outbox
from w8a8.execute.shard import Finished, ShardJob, ShardRecord
from w8a8.execute.staging import Job, Staging
from w8a8.execute.supply import Local, Supply
from w8a8.execute.workers import CarryOut, carry_out, each, worker_count
from w8a8.formats import Arithmetic
from w8a8.formats.provenance import (
    PROVENANCE,
    Provenance,
    SchemeText,
    ShardFile,
    SmallFile,
    SourceFiles,
    TensorBytes,
)
from w8a8.plan import Plan
from w8a8.reading import open_file, reading, real
from w8a8.sources.opening import with_stacks
from w8a8.sources.view import View
from w8a8.storage.writer import SequentialWriter, disk_errors, write_json
from w8a8.version import __version__

Describe = Callable[[Mapping[str, ShardFile], Mapping[str, SmallFile]], Provenance | None]
"""Makes the content of w8a8.json, given the output shards and the other files."""

Arriving = Callable[[View, Path], Supply]
"""Brings the files that a view needs into a folder."""

SLACK_BYTES = 16 << 20
"""Room to leave for the small files, and for a file system's own bookkeeping."""


def execute(
    plan: Plan,
    view: View,
    out: Path,
    arithmetic: Arithmetic,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
    finished: Mapping[str, Finished] | None = None,
    hash_source: bool = False,
    provenance: Describe | None = None,
    arriving: Arriving | None = None,
    delivery: Delivery = HERE,
    sent: Callable[[int], None] = lambda _: None,
    carry: CarryOut | None = None,
) -> int:
    """Carry out `plan`, made from `view`, and publish the result as the folder `out`.

    Returns how many shards an earlier run had finished. Tensors of the result in `finished` are taken from there.
    `hash_source` puts the SHA-256 of every source file into w8a8.json; else only files of the Hub's cache, which are
    named by it, have theirs there.
    `provenance` makes the content of w8a8.json, by default from the plan; where it gives None there is none. `arriving`
    says where the source's files come from, given a folder to put them into; by default they are here. `delivery` takes
    the result to another place; where shards depart, no `out` is made, but its staging folder is used. `carry` carries
    the shards' jobs out, by default on threads; `workers` of them are at work at once.

    `advance` is told of source bytes as they are done, `sent` of bytes of the result that were sent, `notice` of what
    the user should know. Raises the target errors of `w8a8.errors`, those of `quantize_shard` and of `delivery`.
    Whatever is raised, `out` is untouched; finished shards are kept for the next run, except by `SelfCheckError`,
    `NonFiniteWeightError` and `SourceError`.
    """
    # 1) a place for the unfinished result, and what an earlier run left there
    out = real(out)  # of a link, what it leads to is replaced
    if not delivery.departs:
        check_apart(view, out)
    view = with_stacks(view, {decision.tensor.name for decision in plan.decisions})
    with Staging.claim(out, overwrite=overwrite, appears=not delivery.departs) as staging:
        workers = workers or worker_count()
        supply: Supply = arriving(view, staging.arrivals) if arriving else Local(view.checkpoint)
        hash_source = hash_source and not arriving  # what arrives was hashed on its way
        view = replace(view, checkpoint=supply.checkpoint())
        changed = staging.begin(_job(plan, view, supply), view.path, min(workers, worker_count()), delivery)
        if changed:
            notice(changed)
        resumed = len(staging.finished)
        if resumed:
            notice(f"resuming: {resumed} of {len(plan.shards)} shards are done already")
            advance(sum(shard.size for shard in view.shards if shard.name in staging.finished))
        # 2) the shards that are missing, here or where they are sent
        jobs = list(_jobs(plan, view, supply, staging, arithmetic, finished or {}, hash_source))
        plans = {shard.name: shard for shard in plan.shards}

        def made(shard: ShardRecord) -> None:
            staging.record(shard)
            outbox.put(shard)

        def safe(shard: ShardRecord) -> None:
            sent(shard.size)
            if delivery.departs:
                staging.depart(shard.name, plan.header(plans[shard.name]))

        def arrived(shard: ShardRecord) -> None:
            staging.record(shard)
            safe(shard)

        outbox = Outbox(delivery, staging.folder, workers, arrived)
        _check_room(plan, jobs, view, supply.room if jobs else 0, staging.home, outbox.limit)
        try:
            with outbox.running():
                for shard in [*staging.finished.values()]:
                    (safe if shard.receipt else outbox.put)(shard)
                carry = carry or partial(carry_out, workers=workers)
                carry(jobs, supply, advance=advance, record=made, admit=outbox.admit)
            # 3) the small files, and a look at the whole as any reader would
            records = tuple(staging.finished[p.name] for p in plan.shards)
            describe = provenance or partial(_provenance, plan, view, supply, records, hash_source)
            _write_small_files(plan, view, records, staging.folder, describe)
            _self_check(plan, staging.folder)
        except (NonFiniteWeightError, SelfCheckError, SourceError):
            staging.discard()  # going on from here would end here again
            raise
        # 4) visible at once: where it was sent, and here by one rename
        delivery.finish(staging.folder, records)
        (staging.drop if delivery.departs else staging.publish)()
    return resumed


def _jobs(
    plan: Plan,
    view: View,
    supply: Supply,
    staging: Staging,
    arithmetic: Arithmetic,
    finished: Mapping[str, Finished],
    hashed: bool,
) -> Iterator[ShardJob]:
    """Make the jobs of the shards that no earlier run has finished."""
    shards = {shard.name: shard for shard in view.shards}
    for shard in plan.shards:
        if shard.name not in staging.finished:
            own = {write.name: finished[write.name] for write in shard.writes if write.name in finished}
            seen, target = shards[shard.name], staging.folder / shard.name
            source, header = view.path / seen.stored.name, plan.header(shard)
            known = supply.sha256(seen.stored.name)
            yield ShardJob(source, seen, shard, header, target, arithmetic, own, known, hashed)


def _job(plan: Plan, view: View, supply: Supply) -> Job:
    sources = {shard.name: supply.identity(shard.stored.name) for shard in view.shards}
    return Job(__version__, plan.format, plan.recipe, plan.fingerprint(), sources)


def check_apart(view: View, out: Path) -> None:
    """Raise `UsageError` where one of source and target lies in the other."""
    for source in (real(root) for root in view.checkpoint.roots):
        if source.is_relative_to(out) or out.is_relative_to(source):
            raise UsageError(f"{out}: source and target may not contain each other (source: {source})")


def _check_room(
    plan: Plan, jobs: Sequence[ShardJob], view: View, arriving: int, folder: Path, at_once: int | None
) -> None:
    """Raise `DiskFullError` unless there is room for the result, or for `at_once` of its shards if they depart."""
    sidecars = sum(Identity.of(view.home / name).size for name in plan.sidecars)
    shards = sorted((len(job.header) + job.plan.data_bytes for job in jobs), reverse=True)[:at_once]
    needed = sum(shards) + sidecars + arriving + SLACK_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{folder.parent}: the result needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


def _write_small_files(
    plan: Plan, view: View, records: tuple[ShardRecord, ...], folder: Path, describe: Describe
) -> None:
    files = {name: _copy(inside(view.home, name), folder / name) for name in plan.sidecars}
    made = {"config.json": plan.config, **({INDEX: _index(plan)} if plan.indexed else {})}
    for name, value in made.items():
        write_json(folder / name, value, resumable=True)
        files[name] = SmallFile((folder / name).stat().st_size, file_sha256(folder / name))
    shards = {record.name: ShardFile(record.size, record.sha256) for record in records}
    provenance = describe(shards, dict(sorted(files.items())))
    if provenance is not None:
        write_json(folder / PROVENANCE, provenance.to_dict(), resumable=True)


def _digests(view: View, supply: Supply, records: Sequence[ShardRecord], hashed: bool) -> dict[str, str]:
    """The SHA-256 of each source file as far as it is known; if `hashed`, of all.

    Raises `SourceChangedError` where a file in the Hub's cache is not what its name says.
    """
    known = {shard.name: supply.sha256(shard.name) for shard in view.checkpoint.shards}
    if not hashed:
        return {name: digest for name, digest in known.items() if digest}
    passed = {record.name: record.source_sha256 for record in records}
    found = dict.fromkeys(known, "") | {s.stored.name: passed.get(s.name, "") for s in view.shards}

    def add(name: str, stopped: Callable[[], bool]) -> None:
        found[name] = file_sha256(view.path / name, stopped)

    each([name for name, digest in found.items() if not digest], add, worker_count())
    for name, digest in found.items():
        if known[name] not in ("", digest):
            raise SourceChangedError(
                f"{view.path / name}: its SHA-256 is not the one that the Hub gives for it; remove it from the cache, "
                "and download it again"
            )
    return found


def _index(plan: Plan) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in plan.shards)},
        "weight_map": dict(sorted((write.name, shard.name) for shard in plan.shards for write in shard.writes)),
    }


def _provenance(
    plan: Plan,
    view: View,
    supply: Supply,
    records: tuple[ShardRecord, ...],
    hashed: bool,
    shards: Mapping[str, ShardFile],
    files: Mapping[str, SmallFile],
) -> Provenance:
    return Provenance(
        version=__version__,
        source=SourceFiles(plan.source, plan.revision, _digests(view, supply, records, hashed), plan.quantized_source),
        architecture=plan.architecture,
        format=plan.format,
        recipe=plan.recipe,
        calibration=plan.calibration,
        scheme=SchemeText(
            weights=f"int8, symmetric, per output channel, static, {_rounding(plan)}",
            activations="int8, symmetric, per token, dynamic",
        ),
        bytes=TensorBytes(plan.bytes_in, sum(shard.data_bytes for shard in plan.shards)),
        quantized_tensors=sum(decision.quantize for decision in plan.decisions),
        shards=shards,
        files=files,
    )


def _rounding(plan: Plan) -> str:
    return "scales and codes chosen by calibration" if plan.calibration else "round half to even"


def _copy(source: Path, target: Path) -> SmallFile:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with reading(source), open_file(source) as file, SequentialWriter(target) as writer:
        while block := file.read(BLOCK_BYTES):
            writer.append(block)
        writer.finish()
        return SmallFile(writer.size, writer.sha256)


def _self_check(plan: Plan, folder: Path) -> None:
    """Open the result as any reader would and compare it with the plan."""
    try:
        found = Checkpoint.open(folder)
    except W8A8Error as error:
        raise SelfCheckError(f"the finished output does not open, so it was discarded: {error}") from error
    planned = {(w.name, w.dtype, w.shape, w.nbytes) for w in plan.writes()}
    if {(t.name, t.dtype, t.shape, t.nbytes) for t in found.tensors.values()} != planned:
        raise SelfCheckError(f"{folder}: the finished output is not what was planned, so it was discarded")
