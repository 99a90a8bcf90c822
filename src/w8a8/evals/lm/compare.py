"""`w8a8 compare` for two results of `w8a8 eval lm`: each task or group, paired document by document."""

from dataclasses import asdict, dataclass
from typing import Any

from w8a8.errors import UsageError
from w8a8.evals.lm.results import Metric, Result, Row
from w8a8.evals.paired import SIGNIFICANCE, Comparison, paired
from w8a8.reading import brief

AGAIN = "run `w8a8 eval lm` again, with the same options for both"


@dataclass(frozen=True, slots=True)
class Compared:
    """A task or a group by one metric: what the harness computes for both models, and the documents in pairs.

    `paired` is None where documents are not right or wrong (perplexity, F1).
    """

    name: str
    metric: str
    values: tuple[float, float]
    stderrs: tuple[float | None, float | None]
    paired: Comparison | None


@dataclass(frozen=True, slots=True)
class LmComparison:
    """Two results, task by task."""

    base: str
    quant: str
    rows: tuple[Compared, ...]

    @property
    def verdict(self) -> str:
        """One sentence that claims no more than the data show."""
        judged = {row.name: row.paired for row in self.rows if row.paired}
        shown = {name: found for name, found in judged.items() if found.p_value < SIGNIFICANCE}
        if len(judged) == 1:
            return next(iter(judged.values())).verdict
        if not judged:
            return "Nothing to compare: no task's documents are right or wrong."
        if not shown:
            return f"No difference shown in any of {len(judged)} tasks."
        worse, better = ([name for name, found in shown.items() if (found.difference < 0) == less] for less in (1, 0))
        parts = [f"{what} right in {', '.join(names)}" for what, names in (("fewer", worse), ("more", better)) if names]
        chance = f"; by chance alone, {len(judged) * SIGNIFICANCE:.1g} of {len(judged)} tasks would show one"
        return f"The quantized model answers {' and '.join(parts)}{chance}."

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {**asdict(self), "verdict": self.verdict}


def compare(base: Result, quant: Result, *, metric: str | None = None) -> LmComparison:
    """Pair two results by `metric`, or a task's first where it has none such; a group's tasks are taken together.

    Raises UsageError naming the difference if they were not asked the same documents in the same way, or where no task
    has such a metric.
    """
    _check_same(base, quant)
    known = {metric.name for row in base.rows for metric in row.metrics}
    if metric is not None and metric not in known:
        raise UsageError(f"--metric {metric}: no task has it; they have {brief(', '.join(sorted(known)))}")
    theirs = {row.name: row for row in quant.rows}
    return LmComparison(
        base.model, quant.model, tuple(_compared(base, quant, row, theirs[row.name], metric) for row in base.rows)
    )


def _compared(base: Result, quant: Result, row: Row, other: Row, wanted: str | None) -> Compared:
    first = _metric(row, wanted)
    second = _metric(other, first.name)
    right, order = list[tuple[bool, bool]](), {task.name: task for task in quant.of(other)}
    for task in base.of(row):
        sides = task.scores.get(first.name), order[task.name].scores.get(first.name)
        if None in sides or {*sides[0], *sides[1]} - {0, 1}:  # type: ignore[misc]
            right.clear()
            break
        right += zip(map(bool, sides[0] or ()), map(bool, sides[1] or ()), strict=True)
    return Compared(
        row.name,
        first.name,
        (first.value, second.value),
        (first.stderr, second.stderr),
        paired(right, base=base.model, quant=quant.model, score=first.name) if right else None,
    )


def _metric(row: Row, wanted: str | None) -> Metric:
    found = next((metric for metric in row.metrics if metric.name == wanted), next(iter(row.metrics), None))
    if found is None:
        raise UsageError(f"{brief(row.name)} has no metric to compare by; leave it out")
    return found


def _check_same(base: Result, quant: Result) -> None:
    mine, theirs = dict(base.protocol.identity), dict(quant.protocol.identity)
    differing = [
        " ".join((name, brief(mine[name]), "and", brief(theirs[name]))) for name in mine if mine[name] != theirs[name]
    ]
    tasks = {task.name: task for task in quant.tasks}
    if [(row.name, row.tasks) for row in base.rows] != [(row.name, row.tasks) for row in quant.rows]:
        differing.append("the tasks")
    for task in base.tasks if not differing else ():
        other = tasks.get(task.name)
        if other is None or (task.version, task.shots) != (other.version, other.shots):
            differing.append(f"the version or the examples of {brief(task.name)}")
        elif task.documents != other.documents:
            differing.append(f"the documents of {brief(task.name)}, or their prompts")
    if differing:
        raise UsageError(f"not comparable, the models were asked differently: {'; '.join(differing[:10])}; {AGAIN}")
