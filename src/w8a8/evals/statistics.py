"""What so many right answers say about a model, and two models' about their difference."""

import math
from collections.abc import Set
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The Wilson score interval of a proportion; of no trials, (0, 1).

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
    """Two-sided p-value of the exact McNemar test, from the numbers of pairs in which only one of two was right.

    If neither were better, each such pair would be a fair coin: p = 2 P(X <= min), X ~ Binomial(n, 1/2), at most 1.
    Q. McNemar, Psychometrika 12 (1947), its exact form.
    """
    differing = only_first + only_second
    tail = sum(math.comb(differing, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**differing))


def bootstrap(
    values: NDArray[Any], *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` [n], n > 0; the same for the same seed.

    B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7 (1979).
    """
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def jaccard(first: Set[Any], second: Set[Any]) -> float:
    """How far two sets overlap: what both have, as a share of what either has; 1 if neither has anything.

    P. Jaccard, "The Distribution of the Flora in the Alpine Zone", New Phytologist 11 (1912).
    """
    either = first | second
    return len(first & second) / len(either) if either else 1.0
