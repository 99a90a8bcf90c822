"""`w8a8 verify`: is this W8A8 checkpoint what it should be, given its source?

The structure is compared first, from headers: every source tensor accounted for, nothing else there, config and index
in agreement. Then every byte is: the source is streamed as in quantizing, and each block is compared with its
counterpart. Copies must be identical. Codes times scale must lie where rounding to nearest leaves them: within half a
scale for this project's own arithmetic, within one and a half for tools that clip and round their scales.

Of what w8a8.json says was calibrated, weights must be their source but for factors of whole rows and columns, and those
factors must be the ones that the norms before them ask for (`folds.py`).
"""

import hashlib
import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint, Shard, TensorSpec, resolve
from w8a8.checkpoint.reader import INDEX, read_json
from w8a8.checkpoint.stream import file_sha256, read_exactly, shard_blocks, stream, tensor_bytes
from w8a8.errors import W8A8Error
from w8a8.execute.run import PROVENANCE, worker_count
from w8a8.formats import Scheme, detect, section
from w8a8.formats.arithmetic import decode
from w8a8.plan import QUANTIZABLE, Rules, is_linear, module_name, scale_name
from w8a8.verification import folds

HALF_A_SCALE = 0.5 + 2**-10
"""Rounding to nearest, and the float32 rounding of the difference itself."""

FOREIGN_LIMIT = 1.5 + 2**-6
"""Half a scale for rounding, one for clipping at 127 what amax/127.5 in BF16 puts at up to 128."""


@dataclass(frozen=True, slots=True)
class TensorError:
    """One quantized tensor against its source.

    `sqnr_db` is 10 log10(sum w^2 / sum (w - code*scale)^2); `max_error` the largest difference in units of its row's
    scale; `saturated` counts codes at the ends of the range; `zeroed_rows` rows that were not zero and now are.
    """

    name: str
    component: str
    sqnr_db: float
    max_error: float
    saturated: int
    zeroed_rows: int
    signal: float
    noise: float


@dataclass(frozen=True, slots=True)
class ComponentError:
    """All quantized tensors of a component together."""

    component: str
    tensors: int
    sqnr_db: float
    max_error: float
    saturated: int
    zeroed_rows: int


@dataclass(frozen=True)
class VerifyResult:
    """What was found. `problems` make the checkpoint unfit; `warnings` do not. `tensors` are worst first."""

    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    tensors: tuple[TensorError, ...]
    copied: int
    checksums: int
    folded: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def components(self) -> tuple[ComponentError, ...]:
        """The error per component, worst first."""
        groups: dict[str, list[TensorError]] = defaultdict(list)
        for tensor in self.tensors:
            groups[tensor.component].append(tensor)
        rows = [
            ComponentError(
                component,
                len(members),
                sqnr(sum(t.signal for t in members), sum(t.noise for t in members)),
                max(t.max_error for t in members),
                sum(t.saturated for t in members),
                sum(t.zeroed_rows for t in members),
            )
            for component, members in groups.items()
        ]
        return tuple(sorted(rows, key=lambda row: row.sqnr_db))

    @property
    def verdict(self) -> str:
        """One line."""
        if self.problems:
            return f"FAILED: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}; do not use it"
        total = sqnr(sum(t.signal for t in self.tensors), sum(t.noise for t in self.tensors))
        checked = f"{self.checksums} checksums hold" if self.checksums else "no w8a8.json, so no checksums to check"
        quantized = f"{len(self.tensors)} tensors quantized at {total:.2f} dB SQNR"
        copied = f"{self.copied} copied bit for bit" + (f", {self.folded} folded" if self.folded else "")
        return f"OK: {quantized}, {copied}; {checked}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite SQNR (no error at all) is null."""
        rows = [{**asdict(t), "sqnr_db": _finite(t.sqnr_db), "max_error": _finite(t.max_error)} for t in self.tensors]
        components = [
            {**asdict(c), "sqnr_db": _finite(c.sqnr_db), "max_error": _finite(c.max_error)} for c in self.components
        ]
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
            "copied": self.copied,
            "folded": self.folded,
            "checksums": self.checksums,
            "components": components,
            "tensors": rows,
        }


@dataclass(frozen=True)
class Job:
    """Both checkpoints, open, and what the result says of itself."""

    source: Checkpoint
    out: Checkpoint
    scheme: Scheme
    provenance: Mapping[str, Any] | None
    rules: Rules

    def calibrated(self, kind: str) -> frozenset[str]:
        """The tensors that calibration has `changed` (codes) or `folded` (copies)."""
        return frozenset(name for name in _list(self._calibration.get(kind)) if isinstance(name, str))

    @property
    def folds(self) -> tuple["Fold", ...]:
        """The norms that calibration has changed, and what reads them."""
        return tuple(fold for entry in _list(self._calibration.get("norms")) if (fold := _fold(entry, self)))

    @property
    def _calibration(self) -> Mapping[str, Any]:
        return section(self.provenance or {}, "calibration")

    @property
    def error_limit(self) -> float:
        """How far a weight may have moved, in units of its scale."""
        ours = self.provenance is not None and self.provenance.get("format") in {"quark", "compressed-tensors"}
        return HALF_A_SCALE if ours else FOREIGN_LIMIT


@dataclass(frozen=True, slots=True)
class Fold:
    """A norm's weight in the source and in the result, what the norm adds to it, and the weights that read it."""

    before: TensorSpec
    after: TensorSpec
    offset: float
    readers: tuple[str, ...]


def prepare(out: str | Path, source: str | Path) -> Job:
    """Open both checkpoints. Raises `W8A8Error` where one does not open."""
    result = Checkpoint.open(out)
    original = Checkpoint.open(resolve(source).path)
    return Job(
        original, result, detect(result.config), _read_provenance(result.path), Rules.for_config(original.config)
    )


def verify(
    out: str | Path,
    source: str | Path,
    *,
    workers: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> VerifyResult:
    """Compare the W8A8 checkpoint `out` (by this tool or another, quark or compressed-tensors) with its `source`.

    Raises `W8A8Error` where either does not open; anything found wrong inside is in the result's `problems`.
    """
    return run(prepare(out, source), workers=workers, advance=advance)


def run(job: Job, *, workers: int | None = None, advance: Callable[[int], None] = lambda _: None) -> VerifyResult:
    """Carry out a prepared job; see `verify`."""
    problems, warnings = list(_structure_problems(job)), list(_exclude_warnings(job))
    # What another tool chose to write differently is worth a word; in our own output it is a sign of tampering.
    (problems if job.provenance is not None else warnings).extend(_bookkeeping_problems(job))
    comparison = _compare_bytes(job, workers or worker_count(), advance)
    problems += comparison.problems
    problems += _fold_problems(job, comparison.factors)
    tensors = sorted(comparison.errors, key=lambda t: (t.sqnr_db, t.name))
    return VerifyResult(
        tuple(problems), tuple(warnings), tuple(tensors), comparison.copied, comparison.checksums, comparison.folded
    )


def sqnr(signal: float, noise: float) -> float:
    """Signal to quantization noise in dB: infinite without noise, minus infinite with nothing else."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- from headers -------------------------------------------------------------------------------------------------


def _scale_of(tensor: TensorSpec, out: Checkpoint) -> TensorSpec | None:
    return out.tensors.get(scale_name(tensor.name))


def _is_quantized(tensor: TensorSpec, job: Job) -> bool:
    made = job.out.tensors.get(tensor.name)
    return made is not None and made.dtype == "I8" and tensor.dtype in QUANTIZABLE


def _structure_problems(job: Job) -> Iterator[str]:
    """Every source tensor accounted for, with the right shape and a fitting scale, and nothing else there."""
    if not job.scheme.w8a8:
        yield f"config.json: does not declare INT8 W8A8 per channel and per token ({job.scheme.summary})"
    scales = set()
    for tensor in job.source.tensors.values():
        made = job.out.tensors.get(tensor.name)
        if made is None:
            yield f"{tensor.name}: in the source, missing from the result"
            continue
        if made.shape != tensor.shape:
            yield f"{tensor.name}: {list(tensor.shape)} in the source, {list(made.shape)} in the result"
        elif _is_quantized(tensor, job):
            scale = _scale_of(tensor, job.out)
            scales.add(scale_name(tensor.name))
            yield from _scale_shape_problems(tensor, scale)
            if job.scheme.leaves_alone(module_name(tensor.name)):
                yield f"{tensor.name}: INT8, but config.json excludes it, so engines would take it for {tensor.dtype}"
        elif made.dtype != tensor.dtype:
            yield f"{tensor.name}: {tensor.dtype} in the source, {made.dtype} in the result"
    for name in job.out.tensors.keys() - job.source.tensors.keys() - scales:
        yield f"{name}: in the result, but neither in the source nor the scale of a quantized tensor"


def _scale_shape_problems(tensor: TensorSpec, scale: TensorSpec | None) -> Iterator[str]:
    rows = tensor.shape[0] if tensor.shape else 0
    if len(tensor.shape) != 2:
        yield f"{tensor.name}: INT8, but {list(tensor.shape)} is no matrix, so it has no channels to check"
    elif scale is None:
        yield f"{tensor.name}: INT8, but it has no weight_scale"
    elif scale.shape not in {(rows,), (rows, 1)} or scale.dtype not in QUANTIZABLE:
        yield f"{scale.name}: {scale.dtype} {list(scale.shape)} is no scale for {rows} rows"


def _bookkeeping_problems(job: Job) -> Iterator[str]:
    """Config, index and sidecars: as the source's, apart from what quantizing adds."""
    theirs = {key: value for key, value in job.out.config.items() if key != "quantization_config"}
    if theirs != dict(job.source.config):
        changed = sorted(
            k for k in theirs.keys() | job.source.config.keys() if theirs.get(k) != job.source.config.get(k)
        )
        yield f"config.json: differs from the source's in {', '.join(changed)}"
    if job.out.indexed:
        total = section(read_json(job.out.path / INDEX), "metadata").get("total_size")
        if total != job.out.nbytes:
            yield f"{INDEX}: total_size is {total}, the tensors have {job.out.nbytes} bytes"
    for name in job.source.sidecars:
        if name != "config.json" and name not in job.out.sidecars:
            yield f"{name}: beside the source, missing beside the result"


def _exclude_warnings(job: Job) -> Iterator[str]:
    """Linear layers that stay as they were must be excluded by name, or engines build them as INT8."""
    for tensor in job.source.tensors.values():
        if is_linear(tensor, job.rules.judge(tensor).component) and not _is_quantized(tensor, job):
            module = module_name(tensor.name)
            if not job.scheme.leaves_alone(module):
                yield f"{module}: left in {tensor.dtype}, but config.json does not exclude it by name"


def _read_provenance(folder: Path) -> Mapping[str, Any] | None:
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except (ValueError, OSError) as error:
        raise W8A8Error(f"{path}: cannot be read ({error}); it is not as it was written") from error


# --- from bytes ---------------------------------------------------------------------------------------------------


@dataclass
class _Comparison:
    """What the worker threads found, each adding its own shard's findings at its end."""

    problems: list[str]
    errors: list[TensorError]
    copied: int = 0
    checksums: int = 0
    folded: int = 0
    factors: dict[str, tuple[folds.Floats, folds.Floats]] = field(default_factory=dict)

    def add(self, other: "_Comparison") -> None:
        self.problems += other.problems
        self.errors += other.errors
        self.copied += other.copied
        self.checksums += other.checksums
        self.folded += other.folded
        self.factors |= other.factors


def _compare_bytes(job: Job, workers: int, advance: Callable[[int], None]) -> _Comparison:
    stop = threading.Event()
    found = _Comparison([], [])
    with ThreadPoolExecutor(workers, thread_name_prefix="verify") as pool:
        shards = sorted(job.source.shards, key=lambda shard: -shard.size)
        tasks = [pool.submit(_compare_shard, job, shard, stop, advance) for shard in shards]
        tasks += [pool.submit(_check_sum, job, shard, stop) for shard in job.out.shards if job.provenance is not None]
        try:
            for task in as_completed(tasks):
                found.add(task.result())
        finally:
            stop.set()
    found.problems.sort()
    return found


def _check_sum(job: Job, shard: Shard, stop: threading.Event) -> _Comparison:
    """The result's own shard against w8a8.json."""
    recorded = section(job.provenance or {}, "shards", shard.name).get("sha256")
    if file_sha256(job.out.path / shard.name, stop) == recorded:
        return _Comparison([], [], checksums=1)
    return _Comparison([f"{shard.name}: is not the file that was written (SHA-256 differs from {PROVENANCE})"], [])


def _compare_shard(job: Job, shard: Shard, stop: threading.Event, advance: Callable[[int], None]) -> _Comparison:
    """One source shard, block by block, against wherever its tensors are in the result."""
    found = _Comparison([], [])
    digest = hashlib.sha256() if job.provenance is not None else None
    tallies = {t.name: tally for t in shard.tensors if (tally := _tally(t, job)) is not None}
    files: dict[str, int] = {}
    buffer = memoryview(bytearray(1))
    try:
        with closing(stream(job.source.path / shard.name, shard_blocks(shard), stop, digest)) as blocks:
            for block, data in blocks:
                tally = tallies.get(block.tensor.name) if block.tensor is not None else None
                if tally is not None:
                    nbytes = tally.counterpart_bytes(block.nbytes)
                    buffer = buffer if len(buffer) >= nbytes else memoryview(bytearray(nbytes))
                    path = job.out.path / tally.made.shard
                    fd = files[tally.made.shard] = files.get(tally.made.shard) or os.open(path, os.O_RDONLY)
                    offset = tally.made.offset + tally.counterpart_bytes(block.offset - tally.source.offset)
                    read_exactly(fd, buffer[:nbytes], offset, path)
                    tally.compare(data, buffer[:nbytes], block.row)
                advance(block.nbytes)
    finally:
        for fd in files.values():
            os.close(fd)
    for tally in tallies.values():
        tally.conclude(found, job)
    if digest is not None:
        if digest.hexdigest() == section(job.provenance or {}, "source", "sha256").get(shard.name):
            found.checksums += 1
        else:
            found.problems.append(f"source {shard.name}: is not the file this was made from (SHA-256 differs)")
    return found


def _tally(tensor: TensorSpec, job: Job) -> "_CopyTally | _FoldedTally | _CodesTally | None":
    """What to do with a tensor's bytes; nothing where the headers already tell that it is wrong."""
    made = job.out.tensors.get(tensor.name)
    if made is None or made.shape != tensor.shape:
        return None
    if made.dtype == tensor.dtype:
        return (
            _FoldedTally if tensor.name in job.calibrated("folded") and tensor.dtype in QUANTIZABLE else _CopyTally
        )(tensor, made)
    scale = _scale_of(tensor, job.out)
    if not _is_quantized(tensor, job) or scale is None or any(_scale_shape_problems(tensor, scale)):
        return None
    kind = _ChangedTally if tensor.name in job.calibrated("changed") else _CodesTally
    return kind(tensor, made, read_values(job.out, scale))


def read_values(checkpoint: Checkpoint, tensor: TensorSpec) -> NDArray[np.float32]:
    """A tensor's values, flat. Raises what `tensor_bytes` raises."""
    return decode(tensor_bytes(checkpoint.path, tensor), tensor.dtype)


class _CopyTally:
    """A copied tensor: identical so far, or not."""

    def __init__(self, source: TensorSpec, made: TensorSpec) -> None:
        self.source, self.made = source, made
        self._same = True

    def counterpart_bytes(self, nbytes: int) -> int:
        return nbytes

    def compare(self, data: memoryview, made: memoryview, _row: int) -> None:
        self._same = self._same and np.array_equal(np.frombuffer(data, np.uint8), np.frombuffer(made, np.uint8))

    def conclude(self, found: _Comparison, _job: Job) -> None:
        if self._same:
            found.copied += 1
        else:
            found.problems.append(f"{self.source.name}: copied, but not bit for bit")


class _FoldedTally(_CopyTally):
    """A copied tensor that something was folded into: finite."""

    def compare(self, data: memoryview, made: memoryview, _row: int) -> None:  # noqa: ARG002 - it may differ
        self._same = self._same and bool(np.isfinite(decode(bytes(made), self.made.dtype)).all())

    def conclude(self, found: _Comparison, _job: Job) -> None:
        if self._same:
            found.folded += 1
        else:
            found.problems.append(f"{self.source.name}: folded, but holds NaN or infinity")


class _CodesTally:
    """A quantized tensor: sums over the rows seen so far."""

    def __init__(self, source: TensorSpec, made: TensorSpec, scale: NDArray[np.float32]) -> None:
        self.source, self.made = source, made
        self._scale = scale
        self._bad_scales = int(np.count_nonzero(~(np.isfinite(scale) & (scale > 0))))
        self._signal = self._noise = self._max_error = 0.0
        self._saturated = self._zeroed = 0

    def counterpart_bytes(self, nbytes: int) -> int:
        """One byte per weight."""
        return nbytes * self.source.numel // self.source.nbytes

    def compare(self, data: memoryview, made: memoryview, row: int) -> None:
        from w8a8.kernels.cpu.rows import BITS, row_error

        bits = np.frombuffer(data, BITS[self.source.dtype]).reshape(-1, self.source.shape[1])
        scale = self._scale[row : row + len(bits)]
        error = row_error(bits, np.frombuffer(made, np.int8).reshape(bits.shape), scale)
        self._signal += float(error.signal.sum())
        self._noise += float(error.noise.sum())
        with np.errstate(all="ignore"):
            self._max_error = float(np.maximum(self._max_error, np.max(error.worst / scale)))  # NaN stays
        self._saturated += int(error.saturated.sum())
        self._zeroed += int(np.count_nonzero((error.signal > 0) & (error.nonzero == 0)))

    def conclude(self, found: _Comparison, job: Job) -> None:
        name = self.source.name
        ratio = sqnr(self._signal, self._noise)
        if self._bad_scales:
            found.problems.append(
                f"{name}: {self._bad_scales} of {len(self._scale)} scales are not finite and positive"
            )
        else:
            found.problems += self._error_problems(job, ratio)
        component = job.rules.judge(self.source).component
        found.errors.append(
            TensorError(
                name, component, ratio, self._max_error, self._saturated, self._zeroed, self._signal, self._noise
            )
        )

    def _error_problems(self, job: Job, _ratio: float) -> list[str]:
        """Further from the source than rounding to nearest takes it."""
        if self._max_error <= job.error_limit:
            return []
        return [
            f"{self.source.name}: a weight is {self._max_error:.3g} scales away from its source; rounding alone leaves "
            f"at most {job.error_limit:.2g}"
        ]


class _ChangedTally(_CodesTally):
    """A calibrated tensor: compared with its source after the factors of rows and columns that fit best."""

    def __init__(self, source: TensorSpec, made: TensorSpec, scale: NDArray[np.float32]) -> None:
        super().__init__(source, made, scale)
        self._weighted, self._energy = np.zeros((2, source.shape[1]))

    def compare(self, data: memoryview, made: memoryview, row: int) -> None:
        weights = decode(bytes(data), self.source.dtype).reshape(-1, self.source.shape[1])
        codes = np.frombuffer(made, np.int8).reshape(weights.shape)
        scale = self._scale[row : row + len(weights), None]
        with np.errstate(all="ignore"):
            found = codes * scale
            rows, columns = folds.fit(weights, found)
            error = np.abs(weights * (rows[:, None] * columns) - found)
            energy = (weights.astype(np.float64) ** 2).sum(0)
            self._weighted += energy * columns
            self._energy += energy
            self._signal += float((found.astype(np.float64) ** 2).sum())
            self._noise += float((error**2).sum())
            self._max_error = float(np.maximum(self._max_error, np.max(error / scale)))  # NaN stays
        self._saturated += int(np.count_nonzero(np.abs(codes.astype(np.int16)) >= 127))
        self._zeroed += int(np.count_nonzero(weights.any(1) & ~codes.any(1)))

    def conclude(self, found: _Comparison, job: Job) -> None:
        super().conclude(found, job)
        columns = np.divide(self._weighted, self._energy, out=np.ones_like(self._energy), where=self._energy > 0)
        found.factors[self.source.name] = columns, self._energy

    def _error_problems(self, _job: Job, ratio: float) -> list[str]:
        """Not the source, by whatever factors."""
        if ratio >= folds.MIN_SQNR_DB:
            return []
        return [
            f"{self.source.name}: {ratio:.1f} dB from its source after the best factors of its rows and columns; "
            f"calibration leaves at least {folds.MIN_SQNR_DB:.0f}"
        ]


def _fold_problems(job: Job, factors: Mapping[str, tuple[folds.Floats, folds.Floats]]) -> Iterator[str]:
    """Norms that do not undo what was folded into the weights behind them."""
    for fold in job.folds:
        before, after = read_values(job.source, fold.before), read_values(job.out, fold.after)
        for name in fold.readers:
            columns, energy = factors.get(name, (np.ones(len(before)), np.ones(len(before))))
            if (
                len(columns) != len(before)
                or folds.misfit(columns, energy, before, after, fold.offset) > folds.MAX_MISFIT
            ):
                yield f"{name}: what was folded into it is not what was taken out of {fold.before.name}"


def _fold(entry: Any, job: Job) -> Fold | None:
    """A fold as w8a8.json records it, if it is one."""
    name, offset, readers = (entry.get(key) if isinstance(entry, dict) else None for key in ("name", "offset", "into"))
    before, after = job.source.tensors.get(str(name)), job.out.tensors.get(str(name))
    if before is None or after is None or before.shape != after.shape or before.dtype not in QUANTIZABLE:
        return None
    if after.dtype != before.dtype or not isinstance(offset, int | float):
        return None
    return Fold(before, after, float(offset), tuple(map(str, _list(readers))))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
