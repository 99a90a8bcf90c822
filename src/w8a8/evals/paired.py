"""Two models' answers to the same questions, paired question by question: counts, tests, and a verdict.

Pairing is far sharper than two accuracies side by side. Questions that both models get right, or both get wrong, say
nothing about a difference; if there is none, every other question is the toss of a fair coin.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w8a8.evals.statistics import bootstrap, jaccard, mcnemar

SIGNIFICANCE = 0.05
RESAMPLES = 10_000
FEWEST = 6
"""The smallest number of differing questions that can reach p < 0.05: 2 / 2^6 = 0.03, but 2 / 2^5 = 0.06."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that only one model answered right; `right` names it, `base` or `quant`. Texts may be left out."""

    index: int
    question: str | None
    gold: str
    right: str
    base_answer: str | None
    quant_answer: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two results, paired. `difference` and `interval` are shares of all questions, quantized minus base."""

    base: str
    quant: str
    score: str
    questions: int
    both_right: int
    only_base: int
    only_quant: int
    both_wrong: int
    difference: float
    interval: tuple[float, float]
    p_value: float
    jaccard: float
    """The overlap of the two sets of questions answered right."""
    flips: tuple[Flip, ...]
    errors: tuple[int, int]
    """Failed requests of both, which count as not right."""

    @property
    def accuracies(self) -> tuple[float, float]:
        """The shares of questions answered right, of base and quantized."""
        return (self.both_right + self.only_base) / self.questions, (self.both_right + self.only_quant) / self.questions

    @property
    def loss(self) -> float:
        """The largest loss, as a share of the questions, that the data do not rule out.

        It is the lower end of the interval. Where no answer became wrong there is nothing to resample: 3/n is the 95%
        bound of what was never seen.
        """
        unseen = 0.0 if self.only_base else min(1.0, 3 / self.questions)
        return max(-self.interval[0], unseen)

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the data show."""
        if not (self.both_right or self.only_base or self.only_quant):
            return f"Nothing to compare: neither model answers any of the {self.questions:,} questions right."
        before, after = (f"{accuracy:.1%}" for accuracy in self.accuracies)
        low, high = (100 * bound for bound in self.interval)
        figures = f"{after} against {before} of {self.questions:,} questions, {100 * self.difference:+.1f} points"
        test = f"95% interval {low:+.1f} to {high:+.1f}, p = {_p(self.p_value)}"
        if self.p_value < SIGNIFICANCE:
            more = "more" if self.difference > 0 else "fewer"
            return f"The quantized model answers {more} of these questions right: {figures} ({test})."
        differing = self.only_base + self.only_quant
        if differing == 0:
            return (
                f"No difference shown: both get the same {after} of {self.questions:,} questions right; "
                f"one on up to {self.loss:.1%} of such questions is not ruled out."
            )
        if differing < FEWEST:
            few = "1 question was" if differing == 1 else f"{differing} questions were"
            return f"No difference shown: {figures}; only {few} answered differently, too few to show one."
        return f"No difference shown: {figures} ({test}); a loss of up to {max(0, -low):.1f} points is not ruled out."

    @property
    def summary(self) -> str:
        """The difference with its interval, in points, and the p-value, for a table."""
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.difference:+.1f} ({low:+.1f} to {high:+.1f}), p = {_p(self.p_value)}"

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {**asdict(self), "accuracies": self.accuracies, "verdict": self.verdict}


def paired(
    right: Sequence[tuple[bool, bool]],
    *,
    base: str,
    quant: str,
    score: str,
    flips: Sequence[Flip] = (),
    errors: tuple[int, int] = (0, 0),
) -> Comparison:
    """Compare the models named `base` and `quant` by whether they answer each question `right`; one at least.

    The rest is what a `Comparison` says besides.
    """
    hits = np.array(right, dtype=np.int8)
    gains = hits[:, 1] - hits[:, 0]
    only_base, only_quant = int((gains < 0).sum()), int((gains > 0).sum())
    return Comparison(
        base=base,
        quant=quant,
        score=score,
        questions=len(hits),
        both_right=int(hits.all(axis=1).sum()),
        only_base=only_base,
        only_quant=only_quant,
        both_wrong=int((~hits.any(axis=1)).sum()),
        difference=(only_quant - only_base) / len(hits),
        interval=bootstrap(gains[np.newaxis], resamples=RESAMPLES)[0],
        p_value=mcnemar(only_base, only_quant),
        jaccard=jaccard(*(set(np.flatnonzero(model).tolist()) for model in hits.T)),
        flips=tuple(flips),
        errors=errors,
    )


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
