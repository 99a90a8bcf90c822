"""How a report looks, on the page and in the figures: colours, ranges, ticks, numbers."""

import math
from collections.abc import Iterable, Sequence

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from w8a8.publish.report.data import Cell
from w8a8.publish.report.facts import Report
from w8a8.publish.results import Bar
from w8a8.verification.result import TensorError

COLOURS = "viridis"
"""matplotlib's colour map for SQNR: perceptually uniform, readable with any colour vision, and in grey."""

LIGHT = ("#2f5f9e", "#2b7d6d", "#b3671b", "#8b4a86", "#75683f", "#a83f4c", "#4a6d28", "#666c78")
DARK = ("#4777bd", "#2f8d7a", "#bd7225", "#9c5b97", "#877a4c", "#bb5260", "#597f33", "#757b88")
"""Colours of components, in the reader's light and dark scheme; white text reads on all of them."""


# --- colours ------------------------------------------------------------------------------------------------------


def ramp(steps: int = 9) -> list[str]:
    """Return the colour map in equal steps, as hex."""
    return [to_hex(colormaps[COLOURS](i / (steps - 1))) for i in range(steps)]


def colour(value: float, low: float, high: float) -> str:
    """Return background and ink of a cell as CSS custom properties; an infinite SQNR gets the colour of its end."""
    return f"--at:{to_hex(colormaps[COLOURS](position(value, low, high) / 100))};--ink:{ink(value, low, high)}"


def ink(value: float, low: float, high: float) -> str:
    """Return black or white, whichever reads better on the colour of `value`."""
    red, green, blue, _ = colormaps[COLOURS](position(value, low, high) / 100)
    return "#000" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "#fff"


# --- ranges and ticks ---------------------------------------------------------------------------------------------


def position(value: float, low: float, high: float) -> float:
    """Return where `value` lies between `low` and `high`, in percent."""
    return round(min(100.0, max(0.0, 100 * (value - low) / (high - low))), 3)


def db_range(cells: Iterable[Cell | TensorError]) -> tuple[float, float]:
    """Return the whole decibels around all finite SQNRs, at least one apart."""
    values = [cell.sqnr_db for cell in cells if math.isfinite(cell.sqnr_db)] or [0.0]
    low, high = math.floor(min(values)), math.ceil(max(values))
    return float(low), float(max(high, low + 1))


def cell_range(report: Report) -> tuple[float, float]:
    """Return the whole decibels around all cells of the heat maps: the ends of the colour map."""
    return db_range(cell for stack in report.stacks for cell in stack.cells)


def score_range(report: Report) -> tuple[float, float]:
    """Return the shares around all intervals of the scores, with a margin."""
    scores = [
        score for result in (report.baseline, report.quant) if result for score in (result.strict, result.flexible)
    ]
    low, high = min((s.low for s in scores), default=0.0), max((s.high for s in scores), default=1.0)
    margin = max(0.02, (high - low) / 8)
    return max(0.0, low - margin), min(1.0, high + margin)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from `low` to `high`."""
    return [float(t) for t in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten from `10**low` to `10**high`, and where they are few, three times each as well."""
    steps = (1, 3) if high - low < 3 else (1,)
    every = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    return [tick for tick in every if low <= math.log10(tick) <= high]


def bar_marks(bars: Sequence[Bar]) -> list[tuple[int, str]]:
    """Return the bars to label with their start: powers of ten if there are several, else about nine of all."""
    powers = [i for i, bar in enumerate(bars) if bar.start > 0 and math.log10(bar.start) % 1 < 1e-9]
    chosen = powers if len(powers) > 2 else range(0, len(bars), 1 + len(bars) // 9)
    return [(i, number(bars[i].start)) for i in chosen]


# --- numbers ------------------------------------------------------------------------------------------------------


def db(value: float) -> str:
    """Write decibels for people: `41.3 dB`."""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact" if value > 0 else "nothing left"


def percent(value: float) -> str:
    """Write a share for people: `71.2%`."""
    return f"{value:.1%}"


def number(value: float) -> str:
    """Write a number with three digits, and powers of ten as a person does: `2.51·10⁻⁵`."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.3g}".partition("e")
    if not exponent:
        return mantissa
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"
