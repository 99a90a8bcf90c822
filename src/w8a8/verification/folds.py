"""Is a calibrated weight still its source, but for what was folded into it?

Folding multiplies whole columns of a matrix (by what its input was divided by) and whole rows (by what its output is
divided by), and a recipe may round otherwise than to nearest. So the factors are fitted: the rows r and columns c
for which r_i c_j w_ij is nearest to what the codes say, by turns, block of rows by block. What remains is error, and
has to be small. Where a column's factor comes from a norm, the norm says what it has to be: for the product of the two
to be what it was, c_j (norm'_j + offset) = norm_j + offset, but for one number that the rows may have instead.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

TURNS = 4
MIN_SQNR_DB = 15.0
"""Rounding alone leaves 30 to 45 dB; clipping and compensated rounding take some of it; another matrix has 0."""
MAX_MISFIT = 1e-3
"""Of the energy of a norm's factors, what the fitted ones may miss."""

Floats = NDArray[Any]


def fit(source: Floats, made: Floats) -> tuple[Floats, Floats]:
    """Find the factors `(rows [rows], columns [columns])` that take `source` nearest to `made`, float32 matrices."""
    rows = np.ones(len(source))
    square, product = source.astype(np.float64) ** 2, source.astype(np.float64) * made
    for _ in range(TURNS):
        columns = _ratio(rows @ product, rows**2 @ square)
        rows = _ratio(product @ columns, square @ columns**2)
        rows /= np.mean(np.abs(rows)) or 1
    return rows, columns


def misfit(columns: Floats, energy: Floats, before: Floats, after: Floats, offset: float) -> float:
    """Measure how far fitted factors [columns] are from those a norm's weights `before` and `after` ask for, 0 to 1.

    Columns count by their `energy`, because noise hides the factors of those that have none; a channel that the norm
    switches off has no say, if it was off before.
    """
    gains = before.astype(np.float64) + offset, after.astype(np.float64) + offset
    used = (energy > 0) & ((gains[0] != 0) | (gains[1] != 0))
    columns, energy = columns[used], energy[used]
    with np.errstate(all="ignore"):
        wanted = gains[0][used] / gains[1][used]
        scale = np.sum(energy * columns * wanted) / np.sum(energy * wanted**2)
        missed = np.sum(energy * (columns - scale * wanted) ** 2) / np.sum(energy * columns**2)
    return float(missed) if np.isfinite(missed) else 1.0


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Divide, as least squares do; 1 where there is nothing to fit to."""
    return np.divide(numerator, denominator, out=np.ones_like(numerator), where=denominator > 0)
