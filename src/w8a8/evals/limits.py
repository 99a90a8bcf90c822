"""Limits that scripts set on a result: held only where the 95% interval keeps them, not the estimate alone."""

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from w8a8.errors import UsageError
from w8a8.evals.lm.compare import LmComparison
from w8a8.evals.paired import Comparison
from w8a8.terminal.wording import plural

if TYPE_CHECKING:
    from w8a8.evals.kld.run import KldResult

TRY = "try `w8a8 quantize --recipe auto`, and --keep-bf16 1% with it"


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit, and the end of the interval that has to keep it, in the same unit; `broken` says why it is not held."""

    at_most: float
    bound: float
    broken: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "held": not self.broken}


class Measured(Protocol):
    """A result that can be printed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""


R = TypeVar("R", bound=Measured)


@dataclass(frozen=True, slots=True)
class Judged(Generic[R]):
    """A result, and whether it keeps the limit that was set, if one was."""

    result: R
    limit: Limit | None

    def to_dict(self) -> dict[str, Any]:
        """The result's JSON, with the limit."""
        return {**self.result.to_dict(), **({"limit": self.limit.to_dict()} if self.limit else {})}


def share(text: str, option: str) -> float:
    """Read `1%` or `0.01` as 0.01. Raises UsageError that names the `option`."""
    match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)(%?)", text.strip())
    found = float(match[1]) / (100 if match[2] else 1) if match else 2.0
    if found > 1:
        raise UsageError(f"{option} {text!r}: give a share of the questions, such as 1%, from 0% to 100%")
    return found


def judge_kld(result: "KldResult", at_most: float) -> Limit:
    """Judge the mean KL divergence, in nats per token."""
    low, high = result.mean_interval
    if high <= at_most:
        return Limit(at_most, high)
    figures = f"the mean KL divergence is {result.mean:.5f} nats, its 95% interval {low:.5f} to {high:.5f}"
    unsure = "more --tokens narrow the interval; " if result.mean <= at_most else ""
    return Limit(at_most, high, f"--at-most {at_most:g} is not held: {figures}; {unsure}{TRY}")


def judge_comparison(found: Comparison, at_most: float) -> Limit:
    """Judge how many fewer questions the quantized model answers right, as a share of all of them.

    It is held neither where both models answer none right, nor where requests of the base failed: these count as wrong.
    """
    low, high = (f"{100 * bound:+.1f}" for bound in found.interval)
    unsure = "more questions narrow the interval; " if -found.difference <= at_most else ""
    if found.errors[0]:
        failed = plural(found.errors[0], "failed request")
        reason = f"the base has {failed}, which count as wrong; run it again"
    elif not found.both_right + found.only_base + found.only_quant:
        reason = f"neither model answers any of the {found.questions:,} questions right"
    elif round(found.loss - at_most, 12) > 0:
        reason = (
            f"{100 * found.difference:+.1f} points of {found.questions:,} questions, 95% interval {low} to {high}; a "
            f"loss of up to {100 * found.loss:.1f} points is not ruled out; {unsure}{TRY}"
        )
    else:
        return Limit(at_most, found.loss)
    return Limit(at_most, found.loss, f"--at-most-worse {100 * at_most:g}% is not held: {reason}")


def judge_tasks(found: LmComparison, at_most: float) -> Limit:
    """Judge each task as `judge_comparison` does: all have to hold the limit."""
    limits = [
        (
            row.name,
            judge_comparison(row.paired, at_most) if row.paired else Limit(at_most, 1.0, _NOT_PAIRED.format(row)),
        )
        for row in found.rows
    ]
    broken = [f"{name}: {limit.broken}" for name, limit in limits if limit.broken]
    more = f" (and {len(broken) - 1} more of {len(limits)} tasks)" if len(broken) > 1 else ""
    return Limit(at_most, max(limit.bound for _, limit in limits), broken[0] + more if broken else "")


_NOT_PAIRED = "by {0.metric} documents are not right or wrong, so that no share of them is lost; choose a --metric"
