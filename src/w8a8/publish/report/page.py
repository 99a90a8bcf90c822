"""The report as one HTML page: no script, no font, no request; it opens from a disk, a mail, a web server.

Shapes are plain elements placed in per cent, or SVG stretched to its box; words and numbers are HTML, so that they
keep their size on a phone and take the colours of the reader's scheme. Names and answers come from files that may hold
anything: Jinja escapes them, and a content security policy forbids the page to run or fetch whatever it is.
"""

import functools
import math
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from matplotlib import colormaps
from matplotlib.colors import to_hex

from w8a8.plan import module_name
from w8a8.publish.report.data import BINS, Cell, Ridge, db_range, short
from w8a8.publish.report.write import Report
from w8a8.publish.results import Bar
from w8a8.terminal.wording import count, plural, size
from w8a8.version import __version__

COLOURS = "viridis"
"""Of matplotlib: perceptually uniform, readable with any colour vision, and in grey."""

LIGHT = ("#2f5f9e", "#2b7d6d", "#b3671b", "#8b4a86", "#75683f", "#a83f4c", "#4a6d28", "#666c78")
DARK = ("#4777bd", "#2f8d7a", "#bd7225", "#9c5b97", "#877a4c", "#bb5260", "#597f33", "#757b88")
"""Of components, in the reader's light and dark scheme; white text reads on all of them."""

SHOWN_FLIPS = 60
SHOWN_CHARACTERS = 6000


def render(report: Report) -> str:
    """The page, whole."""
    environment = Environment(
        loader=PackageLoader("w8a8.publish.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": size, "count": count, "db": db, "percent": percent, "cut": cut, "short": short, "number": number,
        "exact": "{:.17g}".format, "log10": math.log10, "module": module_name,
    }  # fmt: skip
    low, high = db_range(cell for stack in report.stacks for cell in stack.cells)
    return environment.get_template("report.html.jinja").render(
        r=report,
        version=__version__,
        plural=plural,
        position=position,
        ticks=ticks,
        log_ticks=log_ticks,
        colour=functools.partial(colour, low=low, high=high),
        ramp=", ".join(to_hex(colormaps[COLOURS](i / 8)) for i in range(9)),
        low=low,
        high=high,
        worst_range=db_range(report.worst),
        ridge_path=ridge_path,
        absent=absent(report),
        score_range=score_range(report),
        percent_ticks=lambda low, high: ticks(100 * low, 100 * high),
        captions=captions(report),
        shown_flips=SHOWN_FLIPS,
        light=LIGHT,
        dark=DARK,
        bar_marks=bar_marks,
        colours={row.component: i % len(LIGHT) for i, row in enumerate(report.sizes)},
    )


def captions(report: Report) -> dict[str, str]:
    """A sentence under each figure: what there is to see in it."""
    kept = sum(row.after for row in report.sizes if not row.quantized)
    int8 = [row for row in report.sizes if row.quantized]
    after = f"{size(sum(row.after for row in int8))}, scales included"
    before = size(sum(row.before or 0 for row in int8))
    found = {
        "size": (f"What is quantized goes from {before} to {after}" if report.before else f"INT8 is {after}")
        + (f"; {size(kept)} stays as it was." if kept else ".")
    }
    cells = sorted((c for s in report.stacks for c in s.cells if math.isfinite(c.sqnr_db)), key=lambda c: c.sqnr_db)
    if cells:
        first, last = cells[len(cells) // 10], cells[-1 - len(cells) // 10]
        found["sqnr"] = (
            f"The darker, the more was lost; 6 dB are one bit. Least is left of {_where(cells[0])}, "
            f"{db(cells[0].sqnr_db)}; eight in ten lie between {first.sqnr_db:.1f} and {db(last.sqnr_db)}."
        )
        if any(len(stack.cells) < len(stack.layers) * len(stack.projections) for stack in report.stacks):
            found["sqnr"] += " A gap is a matrix that the layer does not have, or that was not quantized."
    if report.ridges:
        widest = max(report.ridges, key=lambda ridge: ridge.high / ridge.low)
        found["scales"] = (
            "How large one step of INT8 is, channel by channel, over all layers; the mark is the median. "
            f"{widest.projection} spans a factor of {number(widest.high / widest.low)}, "
            "which a single scale for the whole matrix could not follow."
        )
    return found


def absent(report: Report) -> list[str]:
    """What the page would show if it had been given."""
    wanted = {
        "errors and sizes of the source (--source)": report.errors,
        "GSM8K of the original (--baseline)": report.baseline,
        "GSM8K of the quantized model (--quant)": report.quant,
        "KL divergence (--kld)": report.kld,
    }
    return [what for what, found in wanted.items() if not found]


def score_range(report: Report) -> tuple[float, float]:
    """Shares that hold every interval of the scores, with some air."""
    scores = [
        score for result in (report.baseline, report.quant) if result for score in (result.strict, result.flexible)
    ]
    low, high = min((s.low for s in scores), default=0.0), max((s.high for s in scores), default=1.0)
    air = max(0.02, (high - low) / 8)
    return max(0.0, low - air), min(1.0, high + air)


def _where(cell: Cell) -> str:
    return f"layer {cell.place.layer} {cell.place.projection}" if cell.place.stack else cell.place.projection


def colour(value: float, low: float, high: float) -> str:
    """Background and ink of a cell, as CSS custom properties; an infinite SQNR has the colour of its end."""
    return f"--at:{to_hex(colormaps[COLOURS](position(value, low, high) / 100))};--ink:{ink(value, low, high)}"


def ink(value: float, low: float, high: float) -> str:
    """Black or white, whichever reads better on the colour of `value`."""
    red, green, blue, _ = colormaps[COLOURS](position(value, low, high) / 100)
    return "#000" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "#fff"


def position(value: float, low: float, high: float) -> float:
    """How far `value` lies from `low` to `high`, in per cent."""
    return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 3)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`."""
    from matplotlib.ticker import MaxNLocator

    return [float(t) for t in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and with few of them also three times these, between `10**low` and `10**high`."""
    steps = (1, 3) if high - low < 3 else (1,)
    every = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in every if low <= math.log10(tick) <= high]


def ridge_path(ridge: Ridge) -> str:
    """The outline of a distribution in a box of `BINS` by 100, its peak at the top."""
    peak = max(ridge.counts)
    points = (f"{i + 0.5:g},{100 - 96 * n / peak:.4g}" for i, n in enumerate(ridge.counts))
    return f"M0,100L{' '.join(points)} {BINS},100Z"


def bar_marks(bars: Sequence[Bar]) -> list[tuple[int, str]]:
    """Which bars have their start written below them: powers of ten if they are several, else every so many."""
    powers = [i for i, bar in enumerate(bars) if bar.start > 0 and math.log10(bar.start) % 1 < 1e-9]
    chosen = powers if len(powers) > 2 else range(0, len(bars), 1 + len(bars) // 9)
    return [(i, number(bars[i].start)) for i in chosen]


def db(value: float) -> str:
    """Decibels for people."""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "nothing left"


def percent(value: float) -> str:
    """A share for people: `71.2%`."""
    return f"{value:.1%}"


def number(value: float) -> str:
    """Three digits, and powers of ten as a person writes them."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        return mantissa
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def cut(text: str) -> str:
    """`text`, or its beginning and how much is missing."""
    missing = len(text) - SHOWN_CHARACTERS
    return text if missing <= 0 else f"{text[:SHOWN_CHARACTERS]}\n… {missing:,} characters more"
