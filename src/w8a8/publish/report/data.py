"""Sizes, errors and scales of a checkpoint, gathered into values ready to be drawn.

A tensor's place in the picture follows from its name: the part before the first number is the stack (the decoder, a
vision tower), the number is the layer, the rest is the projection. Further numbers (experts) are taken together.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w8a8.checkpoint import Checkpoint
from w8a8.plan import Rules, module_name, scale_name
from w8a8.sources.rows import read_values
from w8a8.sources.view import View
from w8a8.verification.result import TensorError, sqnr

ORDER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
BINS = 90


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor's stack, layer and projection; a tensor outside the layers has layer 0 of the stack `""`."""

    stack: str
    layer: int
    projection: str


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of a component: after, with its scales, and before, None where the source is not known."""

    component: str
    before: int | None
    after: int
    quantized: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """The quantized tensors at one place: SQNR in dB, largest error in scales, codes at the ends of the range."""

    place: Place
    sqnr_db: float
    max_error: float
    saturated: int


@dataclass(frozen=True, slots=True)
class Stack:
    """All cells of a stack, and its axes in order; a layer may lack some projections."""

    name: str
    layers: tuple[int, ...]
    projections: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Ridge:
    """The weight scales of a projection over all layers: `counts` between equal steps of log10(scale)."""

    projection: str
    counts: tuple[int, ...]
    low: float
    median: float
    high: float

    @property
    def decades(self) -> float:
        """From the smallest scale to the largest, in powers of ten."""
        return math.log10(self.high / self.low)


def place(tensor: str) -> Place:
    """Return the place that follows from the name of a `tensor`."""
    parts = module_name(tensor).split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal() and len(part) < 6), None)
    if number is None:
        return Place("", 0, ".".join(parts))
    rest = ("*" if part.isdecimal() else part for part in parts[number + 1 :])
    return Place(".".join(parts[:number]), int(parts[number]), ".".join(rest) or parts[number - 1])


def short(projection: str, among: Sequence[str]) -> str:
    """Shorten a projection's name to its last part without `_proj`, if no other `among` these ends alike."""
    last = [name.rpartition(".")[2] for name in among]
    leaf = projection.rpartition(".")[2]
    return leaf.removesuffix("_proj") if last.count(leaf) == 1 else projection


def sizes(out: Checkpoint, source: View | None) -> tuple[Size, ...]:
    """Sum up bytes by component, the largest first."""
    rules = Rules.for_config(out.config)
    owners = {scale_name(t.name): t for t in out.tensors.values() if t.dtype == "I8"}
    after: dict[str, int] = defaultdict(int)
    quantized = set()
    for tensor in out.tensors.values():
        component = rules.judge(owners.get(tensor.name, tensor)).component
        after[component] += tensor.nbytes
        if tensor.dtype == "I8":
            quantized.add(component)
    before: dict[str, int] = defaultdict(int)
    for seen in source.tensors.values() if source else ():
        before[rules.judge(seen).component] += seen.nbytes
    rows = [Size(name, before[name] if source else None, after[name], name in quantized) for name in after | before]
    return tuple(sorted(rows, key=lambda row: (-(row.before or row.after), row.component)))


def stacks(errors: Iterable[TensorError]) -> tuple[Stack, ...]:
    """Group the errors by stack, layer and projection, the largest stack first."""
    groups: dict[Place, list[TensorError]] = defaultdict(list)
    for error in errors:
        groups[place(error.name)].append(error)
    by_stack: dict[str, list[Cell]] = defaultdict(list)
    for where, members in groups.items():
        ratio = sqnr(sum(t.signal for t in members), sum(t.noise for t in members))
        worst, saturated = max(t.max_error for t in members), sum(t.saturated for t in members)
        by_stack[where.stack].append(Cell(where, ratio, worst, saturated))
    found = [
        Stack(
            name,
            tuple(sorted({cell.place.layer for cell in cells})),
            tuple(sorted({cell.place.projection for cell in cells}, key=_order)),
            tuple(sorted(cells, key=lambda cell: (_order(cell.place.projection), cell.place.layer))),
        )
        for name, cells in by_stack.items()
    ]
    return tuple(sorted(found, key=lambda stack: -len(stack.cells)))


def ridges(out: Checkpoint) -> tuple[tuple[Ridge, ...], float, float]:
    """Read the weight scales: their histograms by projection, and the range of log10 that holds all of them.

    Without scales there are no histograms, and the range is 0 to 0.
    """
    groups: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
    for tensor in out.tensors.values():
        scale = out.tensors.get(scale_name(tensor.name))
        if tensor.dtype == "I8" and scale is not None:
            values = read_values(out, scale)
            groups[place(tensor.name).projection].append(values[np.isfinite(values) & (values > 0)])
    found = {name: np.concatenate(values) for name, values in groups.items()}
    found = {name: values for name, values in found.items() if values.size}
    if not found:
        return (), 0.0, 0.0
    low = math.log10(min(float(values.min()) for values in found.values())) - 0.02
    high = math.log10(max(float(values.max()) for values in found.values())) + 0.02
    return tuple(_ridge(name, found[name], low, high) for name in sorted(found, key=_order)), low, high


def _ridge(name: str, values: NDArray[np.float32], low: float, high: float) -> Ridge:
    counts, _ = np.histogram(np.log10(values.astype(np.float64)), bins=BINS, range=(low, high))
    return Ridge(name, tuple(counts.tolist()), float(values.min()), float(np.median(values)), float(values.max()))


def _order(projection: str) -> tuple[int, str]:
    leaf = projection.rpartition(".")[2]
    return (ORDER.index(leaf) if leaf in ORDER else len(ORDER), projection)
