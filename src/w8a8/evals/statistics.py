"""Statistics of evaluations: intervals of a share and of a mean, and tests of the difference between two models."""

import math
from collections.abc import Set
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95

Interval = tuple[float, float]


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The Wilson score interval of a proportion; (0, 1) where there are no trials.

    E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    if trials == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low, high = ((centre + side * spread) / (1 + z * z / trials) for side in (-1, 1))
    # At the ends the bound is exact, and rounding would miss it by 1e-17.
    return (0.0 if successes == 0 else low), (1.0 if successes == trials else high)


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of the exact McNemar test, given how many pairs only the first or only the second wins.

    If neither were better, each such pair would be a fair coin: p = 2 P(X <= min), X ~ Binomial(n, 1/2), at most 1.
    Q. McNemar, Psychometrika 12 (1947), its exact form.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**differing))


def bootstrap(
    values: NDArray[Any],
    starts: NDArray[np.int64] | None = None,
    *,
    resamples: int,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> list[Interval]:
    """The percentile bootstrap interval of the mean of each row of `values` `[rows, n]`, n > 0.

    Blocks that begin at `starts` are resampled whole (default: each value alone); all rows share the draws, and the
    same seed gives the same intervals. A resample has as many blocks as there are; its mean is per value.

    B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979).
    """
    starts = np.arange(values.shape[1]) if starts is None else starts
    sums = np.add.reduceat(values.astype(np.float64), starts, axis=1)
    sizes = np.diff(starts, append=values.shape[1])
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(values)))
    for mean in means:
        drawn = generator.integers(len(starts), size=len(starts))
        mean[:] = sums[:, drawn].sum(axis=1) / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def jaccard(first: Set[Any], second: Set[Any]) -> float:
    """The overlap of two sets: their intersection as a share of their union; 1 if both are empty.

    P. Jaccard, "The Distribution of the Flora in the Alpine Zone", New Phytologist 11 (1912).
    """
    either = first | second
    return len(first & second) / len(either) if either else 1.0
