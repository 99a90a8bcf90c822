"""The report's figures as PNG, for a model card: drawn by matplotlib, on white.

The page draws the same data itself, as HTML: its numbers keep their size on a phone, take the colours of the reader's
scheme, and say more under the mouse; a picture cannot. Colours, ranges and ticks are shared (`style`).
"""

import math
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from w8a8.plan import module_name
from w8a8.publish.report.data import Stack, short
from w8a8.publish.report.facts import Report
from w8a8.publish.report.style import COLOURS, LIGHT, bar_marks, cell_range, ink, number, percent, score_range
from w8a8.publish.results import Gsm8k, Interval, Kld
from w8a8.terminal.wording import printable, size

NUMBERED = 24
"""Most layers for which a cell has room for its number."""

BLUE, GREY = "#2f6f8f", "#8a8f9a"
STYLE: Mapping[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": "#8a8f9a",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "ytick.left": False,
    "figure.constrained_layout.w_pad": 0.15,
    "figure.constrained_layout.h_pad": 0.12,
    "savefig.dpi": 160,
}


def draw(report: Report) -> dict[str, bytes]:
    """Draw every figure that the report has data for: PNG by name."""
    with rc_context(dict(STYLE)):
        return {name: _png(figure) for name, figure in _figures(report)}


def _png(figure: Figure) -> bytes:
    stored = BytesIO()
    figure.savefig(stored, format="png", facecolor="white")
    return stored.getvalue()


def _figures(report: Report) -> Iterator[tuple[str, Figure]]:
    yield "size", _size(report)
    if report.stacks:
        yield "sqnr", _sqnr(report)
        yield "worst", _worst(report)
    if report.ridges:
        yield "scales", _scales(report)
    results = {name: found for name, found in (("original", report.baseline), ("quantized", report.quant)) if found}
    if results:
        yield "gsm8k", _gsm8k(results, score_range(report))
    if report.kld:
        yield "kld", _kld(report.kld)


def _label(name: str) -> str:
    """A name from a checkpoint, on one line and cut to the width of a figure."""
    return printable(name)[-60:]


def _size(report: Report) -> Figure:
    figure = Figure((10, 3), layout="constrained")
    axes = figure.subplots()
    bars = [("after", report.after)] + ([("before", report.before)] if report.before else [])
    for y, (label, total) in enumerate(bars):
        left = 0
        for i, row in enumerate(report.sizes):
            width = getattr(row, label)
            legend = row.component if label == "after" else None
            axes.barh(y, width, left=left, color=LIGHT[i % len(LIGHT)], edgecolor="white", label=legend)
            left += width
        axes.text(total, y, f"  {size(total)}", va="center", fontweight="bold")
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_title("Size by component")
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: size(value))
    axes.legend(frameon=False, ncols=4, loc="upper left", bbox_to_anchor=(0, -0.15))
    return figure


def _sqnr(report: Report) -> Figure:
    rows = [len(stack.projections) for stack in report.stacks]
    figure = Figure((10, 1.4 + 0.42 * sum(rows) + 0.5 * len(rows)), layout="constrained")
    all_axes = figure.subplots(len(rows), squeeze=False, height_ratios=rows)[:, 0]
    for axes, stack in zip(all_axes, report.stacks, strict=True):
        image = _heat_map(axes, stack, *cell_range(report))
    figure.colorbar(image, ax=figure.axes, label="SQNR (dB)", aspect=30, pad=0.01)
    return figure


def _heat_map(axes: Axes, stack: Stack, low: float, high: float) -> QuadMesh:
    # 1) cells, with their numbers where there is room
    grid = [[math.nan] * len(stack.layers) for _ in stack.projections]
    for cell in stack.cells:
        x, y = stack.layers.index(cell.place.layer), stack.projections.index(cell.place.projection)
        grid[y][x] = cell.sqnr_db
        if len(stack.layers) <= NUMBERED:
            colour = ink(cell.sqnr_db, low, high)
            axes.text(x + 0.5, y + 0.5, f"{cell.sqnr_db:.1f}", ha="center", va="center", fontsize=8, color=colour)
    image = axes.pcolormesh(grid, cmap=COLOURS, vmin=low, vmax=high, edgecolor="white", linewidth=1)

    # 2) names of projections, numbers of layers
    names = [_label(short(projection, stack.projections)) for projection in stack.projections]
    axes.set_yticks([y + 0.5 for y in range(len(names))], names)
    axes.invert_yaxis()
    step = 1 + len(stack.layers) // 25
    numbers = [str(layer) if stack.name else "" for layer in stack.layers[::step]]
    axes.set_xticks([x + 0.5 for x in range(0, len(stack.layers), step)], numbers)
    axes.set_title(f"SQNR of each matrix: {_label(stack.name) or 'outside the layers'}")
    axes.set_xlabel("layer")
    return image


def _worst(report: Report) -> Figure:
    figure = Figure((10, 1.4 + 0.3 * len(report.worst)), layout="constrained")
    axes = figure.subplots()
    values = [max(t.sqnr_db, 0.0) for t in report.worst]
    low, high = cell_range(report)
    names = [_label(module_name(t.name)) for t in report.worst]
    axes.scatter(
        values, range(len(values)), c=values, cmap=COLOURS, vmin=low, vmax=high, s=80, edgecolor=GREY, zorder=2
    )
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="y", color="#ebe7dd")
    axes.invert_yaxis()
    axes.set_title("The matrices with the largest error")
    axes.set_xlabel("SQNR (dB)")
    return figure


def _scales(report: Report) -> Figure:
    figure = Figure((10, 1.2 + 0.55 * len(report.ridges)), layout="constrained")
    axes = figure.subplots()
    low, high = report.scale_range
    names = [ridge.projection for ridge in report.ridges]
    for i, ridge in enumerate(report.ridges):
        width, peak = (high - low) / len(ridge.counts), max(ridge.counts)
        x = [10 ** (low + (bin_ + 0.5) * width) for bin_ in range(len(ridge.counts))]
        axes.fill_between(x, i, [i - 1.3 * n / peak for n in ridge.counts], color=BLUE, alpha=0.6, zorder=i)
        axes.plot([ridge.median] * 2, [i - 0.15, i + 0.08], color="black", linewidth=2, zorder=i)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_yticks(range(len(names)), [_label(short(name, names)) for name in names])
    axes.invert_yaxis()
    axes.set_title("Weight scales by projection, all layers; mark: median")
    axes.set_xlabel("scale")
    return figure


def _gsm8k(results: Mapping[str, Gsm8k], limits: tuple[float, float]) -> Figure:
    figure = Figure((10, 1.4 + 0.5 * 2 * len(results)), layout="constrained")
    axes = figure.subplots()
    rows = [(label, reading) for reading in ("strict", "flexible") for label in results]
    for y, (label, reading) in enumerate(rows):
        score: Interval = getattr(results[label], reading)
        error = [[score.value - score.low], [score.high - score.value]]
        colour = BLUE if label == "quantized" else GREY
        axes.errorbar(score.value, y, xerr=error, fmt="o", markersize=10, linewidth=5, color=colour, alpha=0.8)
        axes.text(limits[1], y, f"  {percent(score.value)}", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), [", ".join(row) for row in rows])
    axes.set_xlim(*limits)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.invert_yaxis()
    axes.margins(y=0.15)
    axes.set_title("GSM8K: share of right answers, 95% Wilson intervals")
    return figure


def _kld(kld: Kld) -> Figure:
    figure = Figure((10, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(kld.histogram)), [bar.value for bar in kld.histogram], width=0.95, align="edge", color=BLUE)
    marks = bar_marks(kld.histogram)
    axes.set_xticks([i for i, _ in marks], [label for _, label in marks])
    axes.set_title(f"KL divergence: mean {number(kld.mean.value)} nats, same top token {percent(kld.top1.value)}")
    axes.set_xlabel("nats")
    axes.set_ylabel("tokens")
    return figure
