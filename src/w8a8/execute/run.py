"""`execute`: a plan and its source folder in, a published checkpoint out.

Shards are independent, so they run side by side, the largest first. Each finished one is noted in the journal; the
small files follow; then the whole folder is opened again as any reader would, and only then renamed to OUT.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from w8a8.checkpoint import Checkpoint, Shard, reading
from w8a8.checkpoint.reader import INDEX, inside
from w8a8.checkpoint.stream import Identity, Stopped
from w8a8.errors import DiskFullError, NonFiniteWeightError, SelfCheckError, UsageError, W8A8Error
from w8a8.execute.shard import Finished, ShardRecord, quantize_shard
from w8a8.execute.staging import Staging
from w8a8.formats import Arithmetic
from w8a8.plan import Plan, ShardPlan
from w8a8.storage.writer import disk_errors
from w8a8.version import __version__

PROVENANCE = "w8a8.json"
SLACK_BYTES = 16 << 20
"""Room to leave for the small files, and for a file system's own bookkeeping."""


def worker_count() -> int:
    """Shards to work on at once: one per core this process may use, at most 8, which any one disk is busy with."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    out: Path,
    arithmetic: Arithmetic,
    *,
    overwrite: bool = False,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
    finished: Mapping[str, Finished] | None = None,
) -> int:
    """Carry out `plan`, made from `checkpoint`, and publish the result as the folder `out`.

    Returns how many shards an earlier run had finished. Tensors of the result in `finished` are taken from there.

    `advance` is told of source bytes as they are done, `notice` of what the user should know. Raises the target errors
    of `w8a8.errors` and those of `quantize_shard`. Whatever is raised, `out` is untouched; finished shards are kept for
    the next run, except by `SelfCheckError` and `NonFiniteWeightError`.
    """
    out = Path(os.path.realpath(out))  # of a link, what it leads to is replaced
    check_apart(checkpoint.path, out)
    shards = {shard.name: shard for shard in checkpoint.shards}
    with Staging.claim(out, overwrite=overwrite) as staging:
        changed = staging.begin(_job(plan, checkpoint))
        if changed:
            notice(changed)
        resumed = len(staging.finished)
        if resumed:
            notice(f"resuming: {resumed} of {len(plan.shards)} shards are done already")
            advance(sum(shards[name].size for name in staging.finished))
        todo = [(shards[p.name], p) for p in plan.shards if p.name not in staging.finished]
        _check_room(plan, [p for _, p in todo], checkpoint, staging.home)
        try:
            _run_shards(plan, checkpoint, todo, staging, arithmetic, workers or worker_count(), advance, finished or {})
            records = tuple(staging.finished[p.name] for p in plan.shards)
            _write_small_files(plan, checkpoint, records, staging.folder)
            _self_check(plan, staging.folder)
        except (NonFiniteWeightError, SelfCheckError):
            staging.discard()  # going on from here would end here again
            raise
        staging.publish()
    return resumed


def _job(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """What decides the result's bytes: the plan, this version, and the source files as they are now."""
    files = {shard.name: Identity.of(checkpoint.path / shard.name) for shard in checkpoint.shards}
    return {
        "version": __version__,
        "format": plan.format,
        "recipe": plan.recipe,
        "plan": plan.fingerprint(),
        "sources": {name: [file.size, file.mtime_ns] for name, file in files.items()},
    }


def check_apart(source: Path, out: Path) -> None:
    """Raise `UsageError` where one of the folders lies in the other."""
    source = source.resolve()
    if source.is_relative_to(out) or out.is_relative_to(source):
        raise UsageError(f"{out}: source and target may not contain each other (source: {source})")


def _check_room(plan: Plan, todo: list[ShardPlan], checkpoint: Checkpoint, folder: Path) -> None:
    sidecars = sum(Identity.of(checkpoint.path / name).size for name in plan.sidecars)
    needed = sum(len(plan.header(p)) + p.data_bytes for p in todo) + sidecars + SLACK_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DiskFullError(
            f"{folder.parent}: the result needs {needed / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free; "
            "free some space or choose another disk"
        )


def _run_shards(
    plan: Plan,
    checkpoint: Checkpoint,
    todo: list[tuple[Shard, ShardPlan]],
    staging: Staging,
    arithmetic: Arithmetic,
    workers: int,
    advance: Callable[[int], None],
    finished: Mapping[str, Finished],
) -> None:
    stop, journal = threading.Event(), threading.Lock()

    def run(shard: Shard, shard_plan: ShardPlan) -> None:
        if stop.is_set():
            raise Stopped
        source, target = checkpoint.path / shard.name, staging.folder / shard_plan.name
        header = plan.header(shard_plan)
        record = quantize_shard(source, shard, shard_plan, header, target, arithmetic, stop, advance, finished)
        with journal:
            staging.record(record)

    largest_first = sorted(todo, key=lambda pair: -pair[0].size)
    with ThreadPoolExecutor(workers, thread_name_prefix="shard") as pool:
        try:
            for future in as_completed([pool.submit(run, *pair) for pair in largest_first]):
                future.result()
        finally:
            stop.set()


def _write_small_files(plan: Plan, checkpoint: Checkpoint, records: tuple[ShardRecord, ...], folder: Path) -> None:
    for name in plan.sidecars:
        _copy(inside(checkpoint.path, name), folder / name)
    _write_json(folder / "config.json", plan.config)
    if plan.indexed:
        _write_json(folder / INDEX, _index(plan))
    _write_json(folder / PROVENANCE, _provenance(plan, records))


def _index(plan: Plan) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in plan.shards)},
        "weight_map": dict(sorted((write.name, shard.name) for shard in plan.shards for write in shard.writes)),
    }


def _provenance(plan: Plan, records: tuple[ShardRecord, ...]) -> dict[str, Any]:
    """What `w8a8.json` says. No times and no paths: the same job gives the same bytes anywhere."""
    return {
        "tool": "w8a8",
        "version": __version__,
        "source": {
            "name": plan.source,
            "revision": plan.revision,
            "sha256": {record.name: record.source_sha256 for record in records},
        },
        "architecture": plan.architecture,
        "format": plan.format,
        "recipe": plan.recipe,
        **({"calibration": plan.calibration} if plan.calibration else {}),
        "scheme": {
            "weights": f"int8, symmetric, per output channel, static, {_rounding(plan)}",
            "activations": "int8, symmetric, per token, dynamic",
        },
        "bytes": {"source": plan.bytes_in, "result": sum(shard.data_bytes for shard in plan.shards)},
        "quantized_tensors": sum(decision.quantize for decision in plan.decisions),
        "shards": {record.name: {"size": record.size, "sha256": record.sha256} for record in records},
    }


def _rounding(plan: Plan) -> str:
    return "scales and codes chosen by calibration" if plan.calibration else "round half to even"


def _copy(source: Path, target: Path) -> None:
    with reading(source):
        data = source.read_bytes()
    with disk_errors(target):
        target.parent.mkdir(exist_ok=True)
    _write_synced(target, data)


def _write_json(path: Path, value: Any) -> None:
    _write_synced(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _write_synced(path: Path, data: bytes) -> None:
    with disk_errors(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _self_check(plan: Plan, folder: Path) -> None:
    """Open the result as any reader would and compare it with the plan."""
    try:
        found = Checkpoint.open(folder)
    except W8A8Error as error:
        raise SelfCheckError(f"the finished output does not open, so it was discarded: {error}") from error
    planned = {(w.name, w.dtype, w.shape, w.nbytes) for w in plan.writes()}
    if {(t.name, t.dtype, t.shape, t.nbytes) for t in found.tensors.values()} != planned:
        raise SelfCheckError(f"{folder}: the finished output is not what was planned, so it was discarded")
