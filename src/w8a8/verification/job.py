"""A verification before any weight is read: both checkpoints, open, and the provenance of the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.formats import FORMATS, Scheme, detect
from w8a8.formats.provenance import CalibrationRecord, Provenance
from w8a8.plan import QUANTIZABLE, Rules
from w8a8.plan.rotation import rotated
from w8a8.plan.viewing import view_of
from w8a8.recipes import ROTATES
from w8a8.sources.arriving import Opened
from w8a8.sources.opening import with_stacks
from w8a8.sources.view import LogicalTensor, View
from w8a8.storage.arrivals import Repository

HALF_A_SCALE = 0.5 + 2**-10
"""Rounding to nearest, and the float32 rounding of the difference itself."""

FOREIGN_LIMIT = 1.5 + 2**-6
"""Half a scale for rounding, one for clipping at 127 what amax/127.5 in BF16 puts at up to 128."""


@dataclass(frozen=True, slots=True)
class Fold:
    """A norm's weight in the source and in the result, what the norm adds to it, and the weights that read it."""

    before: LogicalTensor
    after: TensorSpec
    offset: float
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """The view of the source, the result, and its provenance, where there is one.

    With a `repository`, the source's weights arrive while they are compared.
    """

    source: View
    out: Checkpoint
    scheme: Scheme
    provenance: Provenance | None
    rules: Rules
    repository: Repository | None = None

    @cached_property
    def changed(self) -> frozenset[str]:
        """The quantized tensors that calibration changed."""
        return frozenset(self._calibration.changed if self._calibration else ())

    @cached_property
    def folded(self) -> frozenset[str]:
        """The copied tensors that calibration changed."""
        return frozenset(self._calibration.folded if self._calibration else ())

    def folds(self) -> Iterator[Fold]:
        """The norms that calibration changed and both checkpoints hold, with the weights that read them."""
        for norm in self._calibration.norms if self._calibration else ():
            before, after = self.source.tensors.get(norm.name), self.out.tensors.get(norm.name)
            if before is None or after is None or before.dtype not in QUANTIZABLE:
                continue
            if (before.shape, before.dtype) == (after.shape, after.dtype):
                yield Fold(before, after, norm.offset, norm.into)

    @property
    def _calibration(self) -> CalibrationRecord | None:
        return self.provenance.calibration if self.provenance else None

    @property
    def error_limit(self) -> float:
        """How far a weight may have moved, in units of its scale."""
        ours = self.provenance is not None and self.provenance.format in FORMATS
        return HALF_A_SCALE if ours else FOREIGN_LIMIT


def prepare(out: str | Path, source: str | Path, *, here: bool = False) -> Job:
    """Open both checkpoints. With `here`, all of the source has to be here. Raises `W8A8Error` if one does not open."""
    result = Checkpoint.open(out)
    opened = Opened.here(source) if here else Opened.anywhere(source)
    provenance = Provenance.read(result.path)
    seen = view_of(opened.checkpoint)
    if provenance and provenance.recipe.startswith(ROTATES):
        seen = rotated(seen)
    original = with_stacks(seen, result.tensors.keys())
    rules = Rules.for_config(original.config)
    return Job(original, result, detect(result.config), provenance, rules, opened.repository)
