"""`w8a8 compare`: two models' answers to the same questions, paired question by question.

Pairing is far sharper than two accuracies side by side. Questions that both models get right, or both get wrong, say
nothing about a difference; if there is none, every other question is the toss of a fair coin.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from w8a8.errors import UsageError
from w8a8.evals.statistics import bootstrap, jaccard, mcnemar
from w8a8.reading import brief

SIGNIFICANCE = 0.05
RESAMPLES = 10_000
FEWEST = 6
"""The smallest number of differing questions that can reach p < 0.05: 2 / 2^6 = 0.03, but 2 / 2^5 = 0.06."""


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that only one model answered right; `right` names it, `base` or `quant`."""

    index: int
    question: str
    gold: str
    right: str
    base_answer: str
    quant_answer: str


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
        if differing == 0:  # resampling nothing would show nothing; 3/n is the 95% bound of what was never seen
            rare = min(1, 3 / self.questions)
            return (
                f"No difference shown: both get the same {after} of {self.questions:,} questions right; "
                f"one on up to {rare:.1%} of such questions is not ruled out."
            )
        if differing < FEWEST:
            few = "1 question was" if differing == 1 else f"{differing} questions were"
            return f"No difference shown: {figures}; only {few} answered differently, too few to show one."
        return f"No difference shown: {figures} ({test}); a loss of up to {max(0, -low):.1f} points is not ruled out."

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {**asdict(self), "accuracies": self.accuracies, "verdict": self.verdict}


def compare(base: Mapping[str, Any], quant: Mapping[str, Any], *, score: str = "strict") -> Comparison:
    """Pair two GSM8K results (`w8a8.evals.gsm8k.results.read`); `score` is `strict` or `flexible`.

    Raises UsageError naming the difference if they were not asked the same questions in the same way.
    """
    _check_same(base, quant)
    first, second = ({o["index"]: o for o in result["outcomes"]} for result in (base, quant))
    indices = sorted(first)
    right = np.array([(first[i][score], second[i][score]) for i in indices], dtype=np.int8)
    gains = right[:, 1] - right[:, 0]
    only_base, only_quant = int((gains < 0).sum()), int((gains > 0).sum())
    return Comparison(
        base=base["model"],
        quant=quant["model"],
        score=score,
        questions=len(indices),
        both_right=int(right.all(axis=1).sum()),
        only_base=only_base,
        only_quant=only_quant,
        both_wrong=int((~right.any(axis=1)).sum()),
        difference=(only_quant - only_base) / len(indices),
        interval=bootstrap(gains[np.newaxis], resamples=RESAMPLES)[0],
        p_value=mcnemar(only_base, only_quant),
        jaccard=jaccard(*({i for i in indices if of[i][score]} for of in (first, second))),
        flips=tuple(_flip(first[i], second[i], score) for i in indices if first[i][score] != second[i][score]),
        errors=(_errors(base), _errors(quant)),
    )


def _flip(base: Mapping[str, Any], quant: Mapping[str, Any], score: str) -> Flip:
    right = "base" if base[score] else "quant"
    return Flip(base["index"], base["question"], base["gold"], right, base["answer"], quant["answer"])


def _errors(result: Mapping[str, Any]) -> int:
    return sum(outcome.get("error") is not None for outcome in result["outcomes"])


def _check_same(base: Mapping[str, Any], quant: Mapping[str, Any]) -> None:
    first, second = base["protocol"], quant["protocol"]
    names = sorted((first.keys() | second.keys()) - {"concurrency"})
    differing = [
        " ".join((brief(n), brief(first.get(n)), "and", brief(second.get(n))))
        for n in names
        if first.get(n) != second.get(n)
    ]
    if not differing and _asked(base) != _asked(quant):
        differing = ["the questions"]
    if differing:
        raise UsageError(
            f"not comparable, the models were asked differently: {'; '.join(differing[:10])}; run "
            "`w8a8 eval gsm8k` again, with the same options for both"
        )


def _asked(result: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    return {(outcome["index"], outcome["question"], outcome["gold"]) for outcome in result["outcomes"]}


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.1g}"
