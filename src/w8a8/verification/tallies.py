"""Compares a result's tensor with its source, block by block: copied, folded, rounded, or calibrated."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import TensorSpec
from w8a8.plan import QUANTIZABLE
from w8a8.sources.rows import read_values, rows, values
from w8a8.sources.view import LogicalTensor
from w8a8.verification import folds
from w8a8.verification.job import Job
from w8a8.verification.result import TensorError, sqnr
from w8a8.verification.structure import is_quantized, scale_of, scale_shape_problems


@dataclass
class Comparison:
    """The findings so far; each worker thread adds those of its shard at its end."""

    problems: list[str]
    errors: list[TensorError]
    copied: int = 0
    checksums: int = 0
    folded: int = 0
    factors: dict[str, tuple[folds.Floats, folds.Floats]] = field(default_factory=dict)

    def add(self, other: "Comparison") -> None:
        """Add what another thread found."""
        self.problems += other.problems
        self.errors += other.errors
        self.copied += other.copied
        self.checksums += other.checksums
        self.folded += other.folded
        self.factors |= other.factors


def tally(tensor: LogicalTensor, job: Job) -> "CopyTally | CodesTally | None":
    """Choose how to compare a tensor's bytes; None where the headers already tell that it is wrong."""
    made = job.out.tensors.get(tensor.name)
    if made is None or made.shape != tensor.shape:
        return None
    if made.dtype == tensor.dtype:
        folded = tensor.name in job.folded and tensor.dtype in QUANTIZABLE
        return FoldedTally(tensor, made) if folded else CopyTally(tensor, made)
    scale = scale_of(tensor, job.out)
    if not is_quantized(tensor, job) or scale is None or any(scale_shape_problems(tensor, scale)):
        return None
    kind = ChangedTally if tensor.name in job.changed else CodesTally
    return kind(tensor, made, read_values(job.out, scale))


class CopyTally:
    """A copied tensor: identical so far, or not."""

    def __init__(self, source: LogicalTensor, made: TensorSpec) -> None:
        self.source, self.made = source, made
        self._same = True

    def compare(self, data: memoryview, made: memoryview, _row: int) -> None:
        """Compare a block of the source with its counterpart."""
        self._same = self._same and np.array_equal(np.frombuffer(data, np.uint8), np.frombuffer(made, np.uint8))

    def conclude(self, found: Comparison, _job: Job) -> None:
        """Add the verdict to what was found."""
        if self._same:
            found.copied += 1
        else:
            found.problems.append(f"{self.source.name}: copied, but not bit for bit")


class FoldedTally(CopyTally):
    """A copied tensor that something was folded into: finite; a matrix is its source but for factors of its columns."""

    def __init__(self, source: LogicalTensor, made: TensorSpec) -> None:
        super().__init__(source, made)
        self._before, self._after, self._both = np.zeros((3, source.shape[1] if len(source.shape) == 2 else 0))

    def compare(self, data: memoryview, made: memoryview, _row: int) -> None:
        """Add a block's products and squares, by column."""
        found = values(self.made, made)
        self._same = self._same and bool(np.isfinite(found).all())
        if len(self._both):
            weights = values(self.source, data).astype(np.float64)
            with np.errstate(all="ignore"):
                self._before += (weights**2).sum(0)
                self._after += (found.astype(np.float64) ** 2).sum(0)
                self._both += (weights * found).sum(0)

    def conclude(self, found: Comparison, _job: Job) -> None:
        """Add the verdict to what was found, and the factors, which a norm may have to undo."""
        name = self.source.name
        if not self._same:
            found.problems.append(f"{name}: folded, but holds NaN or infinity")
            return
        found.folded += 1
        if len(self._both):
            columns = np.divide(self._both, self._before, out=np.ones_like(self._both), where=self._before > 0)
            found.factors[name] = columns, self._before
            noise = max(float((self._after - columns * self._both).sum()), 0.0)
            if sqnr(float(self._after.sum()), noise) < folds.MIN_SQNR_DB:
                found.problems.append(f"{name}: folded, but no factors of its columns make it of its source")


class CodesTally:
    """A quantized tensor: sums over the rows seen so far."""

    def __init__(self, source: LogicalTensor, made: TensorSpec, scale: NDArray[np.float32]) -> None:
        self.source, self.made = source, made
        self._scale = scale
        self._bad_scales = int(np.count_nonzero(~(np.isfinite(scale) & (scale > 0))))
        self._signal = self._noise = self._max_error = 0.0
        self._saturated = self._zeroed = 0

    def compare(self, data: memoryview, made: memoryview, row: int) -> None:
        """Add the errors of a block of whole rows, the first of which is row `row`."""
        from w8a8.kernels.cpu.rows import row_error

        bits = rows(self.source, data)
        scale = self._scale[row : row + len(bits)]
        error = row_error(bits, np.frombuffer(made, np.int8).reshape(bits.shape), scale)
        self._signal += float(error.signal.sum())
        self._noise += float(error.noise.sum())
        with np.errstate(all="ignore"):
            self._max_error = float(np.maximum(self._max_error, np.max(error.worst / scale)))  # NaN stays
        self._saturated += int(error.saturated.sum())
        self._zeroed += int(np.count_nonzero((error.signal > 0) & (error.nonzero == 0)))

    def conclude(self, found: Comparison, job: Job) -> None:
        """Add the tensor's errors, and its problems, to what was found."""
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
        """Name a tensor further from its source than rounding to nearest takes it."""
        if self._max_error <= job.error_limit:
            return []
        return [
            f"{self.source.name}: a weight is {self._max_error:.3g} scales away from its source; rounding alone leaves "
            f"at most {job.error_limit:.2g}"
        ]


class ChangedTally(CodesTally):
    """A calibrated tensor: compared with its source after the factors of rows and columns that fit best."""

    def __init__(self, source: LogicalTensor, made: TensorSpec, scale: NDArray[np.float32]) -> None:
        super().__init__(source, made, scale)
        self._weighted, self._energy = np.zeros((2, source.shape[1]))

    def compare(self, data: memoryview, made: memoryview, row: int) -> None:
        """Add the errors of a block of whole rows after the factors that fit best."""
        weights = values(self.source, data)
        codes = np.frombuffer(made, np.int8).reshape(weights.shape)
        scale = self._scale[row : row + len(weights), None]
        with np.errstate(all="ignore"):
            found = codes * scale
            by_row, by_column = folds.fit(weights, found)
            error = np.abs(weights * (by_row[:, None] * by_column) - found)
            energy = (weights.astype(np.float64) ** 2).sum(0)
            self._weighted += energy * by_column
            self._energy += energy
            self._signal += float((found.astype(np.float64) ** 2).sum())
            self._noise += float((error**2).sum())
            self._max_error = float(np.maximum(self._max_error, np.max(error / scale)))  # NaN stays
        self._saturated += int(np.count_nonzero(np.abs(codes.astype(np.int16)) >= 127))
        self._zeroed += int(np.count_nonzero(weights.any(1) & ~codes.any(1)))

    def conclude(self, found: Comparison, job: Job) -> None:
        """Add also the factors of the columns, which a norm may have to undo."""
        super().conclude(found, job)
        columns = np.divide(self._weighted, self._energy, out=np.ones_like(self._energy), where=self._energy > 0)
        found.factors[self.source.name] = columns, self._energy

    def _error_problems(self, _job: Job, ratio: float) -> list[str]:
        """Name a tensor that is not its source by whatever factors."""
        if ratio >= folds.MIN_SQNR_DB:
            return []
        return [
            f"{self.source.name}: {ratio:.1f} dB from its source after the best factors of its rows and columns; "
            f"calibration leaves at least {folds.MIN_SQNR_DB:.0f}"
        ]
