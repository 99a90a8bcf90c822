"""The report as one HTML page without scripts, fonts or requests: it opens from a disk, a mail or a web server.

Shapes are plain elements placed in per cent, or SVG stretched to its box; words and numbers are HTML, so that they
keep their size on a phone and take the colours of the reader's scheme. Names and answers come from files that may hold
anything: Jinja escapes them, and a content security policy forbids the page to run or fetch whatever it is.
"""

import functools
import math
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from w8a8.plan import module_name
from w8a8.publish.report import style
from w8a8.publish.report.data import BINS, Cell, Ridge, Stack, short
from w8a8.publish.report.facts import Report
from w8a8.publish.report.style import db, number
from w8a8.terminal.wording import count, plural, size
from w8a8.version import __version__

SHOWN_FLIPS = 60
SHOWN_CHARACTERS = 6000


def render(report: Report) -> str:
    """Return the page as HTML."""
    environment = Environment(
        loader=PackageLoader("w8a8.publish.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size, "count": count, "db": db, "percent": style.percent, "number": number, "cut": cut,
        "short": short, "exact": "{:.17g}".format, "log10": math.log10, "module": module_name,
    }  # fmt: skip
    low, high = style.cell_range(report)
    return environment.get_template("report.html.jinja").render(
        r=report,
        version=__version__,
        plural=plural,
        captions=captions(report),
        absent=absent(report),
        shown_flips=SHOWN_FLIPS,
        # colours
        light=style.LIGHT,
        dark=style.DARK,
        colours={row.component: i % len(style.LIGHT) for i, row in enumerate(report.sizes)},
        colour=functools.partial(style.colour, low=low, high=high),
        ramp=", ".join(style.ramp()),
        # ranges and ticks
        low=low,
        high=high,
        worst_range=style.db_range(report.worst),
        score_range=style.score_range(report),
        position=style.position,
        ticks=style.ticks,
        log_ticks=style.log_ticks,
        percent_ticks=lambda low, high: style.ticks(100 * low, 100 * high),
        bar_marks=style.bar_marks,
        ridge_path=ridge_path,
    )


def captions(report: Report) -> dict[str, str]:
    """Return a sentence for each figure, by section."""
    found = {"size": _size_caption(report)}
    if any(math.isfinite(cell.sqnr_db) for stack in report.stacks for cell in stack.cells):
        found["sqnr"] = _sqnr_caption(report.stacks)
    if report.ridges:
        found["scales"] = _scales_caption(report.ridges)
    return found


def _size_caption(report: Report) -> str:
    kept = sum(row.after for row in report.sizes if not row.quantized)
    int8 = [row for row in report.sizes if row.quantized]
    after = f"{size(sum(row.after for row in int8))}, scales included"
    before = size(sum(row.before or 0 for row in int8))
    changed = f"The quantized layers go from {before} to {after}" if report.before else f"INT8 is {after}"
    return f"{changed}; {size(kept)} stays as it was." if kept else f"{changed}."


def _sqnr_caption(stacks: Sequence[Stack]) -> str:
    cells = sorted((c for s in stacks for c in s.cells if math.isfinite(c.sqnr_db)), key=lambda c: c.sqnr_db)
    first, last = cells[len(cells) // 10], cells[-1 - len(cells) // 10]
    caption = (
        f"Darker means a larger error; 6 dB are one bit. The lowest is {_where(cells[0])}, "
        f"{db(cells[0].sqnr_db)}; eight in ten lie between {first.sqnr_db:.1f} and {db(last.sqnr_db)}."
    )
    if any(len(stack.cells) < len(stack.layers) * len(stack.projections) for stack in stacks):
        caption += " A gap is a matrix that the layer does not have, or that was not quantized."
    return caption


def _scales_caption(ridges: Sequence[Ridge]) -> str:
    widest = max(ridges, key=lambda ridge: ridge.high / ridge.low)
    return (
        "The size of one INT8 step, channel by channel, over all layers; the mark is the median. "
        f"{widest.projection} spans a factor of {number(widest.high / widest.low)}, "
        "which a single scale for the whole matrix could not follow."
    )


def absent(report: Report) -> list[str]:
    """Name the results that were not given, for the end of the page."""
    wanted = {
        "errors and sizes of the source (--source)": report.errors,
        "GSM8K of the original (--baseline)": report.baseline,
        "GSM8K of the quantized model (--quant)": report.quant,
        "KL divergence (--kld)": report.kld,
    }
    return [what for what, found in wanted.items() if not found]


def _where(cell: Cell) -> str:
    return f"layer {cell.place.layer} {cell.place.projection}" if cell.place.stack else cell.place.projection


def ridge_path(ridge: Ridge) -> str:
    """Return an SVG path: the outline of a histogram in a box of `BINS` by 100, its peak at the top."""
    peak = max(ridge.counts)
    points = (f"{i + 0.5:g},{100 - 96 * n / peak:.4g}" for i, n in enumerate(ridge.counts))
    return f"M0,100L{' '.join(points)} {BINS},100Z"


def cut(text: str) -> str:
    """Return `text`, or its beginning and the number of characters left out."""
    missing = len(text) - SHOWN_CHARACTERS
    return text if missing <= 0 else f"{text[:SHOWN_CHARACTERS]}\n… {missing:,} characters more"
