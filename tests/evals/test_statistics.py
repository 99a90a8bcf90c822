import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest  # type: ignore[import-untyped]
from scipy.stats import bootstrap as scipy_bootstrap

from w8a8.evals.statistics import bootstrap, jaccard, mcnemar, wilson

counts = st.integers(0, 1500)


@given(counts, counts)
def test_the_wilson_interval_is_scipys(right: int, wrong: int) -> None:
    trials = max(1, right + wrong)
    theirs = binomtest(right, trials).proportion_ci(0.95, method="wilson")
    assert wilson(right, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_of_no_trials_nothing_is_known() -> None:
    assert wilson(0, 0) == (0, 1)


@given(counts, counts)
def test_mcnemar_is_the_exact_binomial_test_of_the_pairs_that_differ(first: int, second: int) -> None:
    theirs = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(theirs, rel=1e-9)


def test_the_bootstrap_interval_is_near_scipys_and_the_same_each_time() -> None:
    values = np.repeat([-1, 0, 1], [40, 900, 25])
    theirs = scipy_bootstrap((values,), np.mean, method="percentile", rng=1).confidence_interval
    (ours,) = bootstrap(values[np.newaxis], resamples=10_000)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert bootstrap(values[np.newaxis], resamples=10_000) == [ours]


def test_the_interval_is_wider_where_neighbours_are_alike() -> None:
    rng = np.random.default_rng(1)
    alike = np.repeat(rng.exponential(size=64), 128)
    single = rng.permutation(alike)
    starts = np.arange(0, len(alike), 128)
    (a, b), (c, d) = bootstrap(np.stack([alike, single]), starts, resamples=2000)
    assert (b - a) > 5 * (d - c)
    assert b - a == pytest.approx(2 * 1.96 * alike[::128].std() / 8, rel=0.2)


def test_jaccard_is_the_share_of_what_either_has() -> None:
    assert jaccard({1, 2, 3}, {2, 3, 4, 5}) == 2 / 5
    assert jaccard({1}, {2}) == 0
    assert jaccard(set(), set()) == 1
