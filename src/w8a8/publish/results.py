"""Result files of `w8a8 eval`, read for a card or a report: GSM8K, other tasks and KL divergence as checked values.

They are a user's files, perhaps from elsewhere: every number is checked before it is shown. Text in them (questions,
answers, names) stays text, and is only ever shown escaped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from w8a8.errors import InvalidResultError
from w8a8.evals.gsm8k.compare import compare
from w8a8.evals.gsm8k.results import Asked, Share, read_checked
from w8a8.evals.lm import results as lm
from w8a8.evals.lm.compare import compare as compare_lm
from w8a8.evals.paired import Comparison
from w8a8.reading import Count, Number, UnfitError, read_json


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Gsm8k:
    """One model's GSM8K scores, `right` of them by the strict one.

    `raw` is the whole result, with its answers, for `w8a8.evals.gsm8k.compare`.
    """

    model: str
    questions: int
    asked: Asked
    right: int
    strict: Interval
    flexible: Interval
    cut_off: int
    empty: int
    errors: int
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram: `value` tokens from `start` to `end` nats, or nats per token at these positions."""

    start: float
    end: float
    value: float


@dataclass(frozen=True, slots=True)
class Kld:
    """KL divergence of the candidate's next-token distributions from the reference's, in nats.

    `float32` says that both were computed in float32, not in the dtype they are stored in.
    """

    reference: str
    candidate: str
    text: str
    tokens: int
    float32: bool
    mean: Interval
    median: float
    p99: float
    max: float
    top1: Interval
    perplexity_reference: float
    perplexity_candidate: float
    histogram: tuple[Bar, ...]
    positions: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """A task of lm-evaluation-harness by one metric: of the original and of the quantized model, value and error.

    `difference` says what is shown between them, where documents are paired.
    """

    task: str
    metric: str
    shots: str
    documents: int
    values: tuple[lm.Metric | None, lm.Metric | None]
    difference: str


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks of lm-evaluation-harness: its version, how they were asked, and a row for each task and metric."""

    harness: str
    chat: bool
    limit: int | None
    rows: tuple[Scored, ...]
    verdict: str


@dataclass(frozen=True, slots=True)
class Results:
    """Result files, of the original and of the quantized model: GSM8K, the KL divergence between them, other tasks."""

    baseline: Path | None = None
    quant: Path | None = None
    kld: Path | None = None
    lm_baseline: Path | None = None
    lm_quant: Path | None = None

    def read(self) -> "Measured":
        """Read the files there are.

        Raises `InvalidResultError` where one is something else, `UsageError` where two results do not compare.
        """
        baseline, quant = (read_gsm8k(path) if path else None for path in (self.baseline, self.quant))
        paired = compare(baseline.raw, quant.raw) if baseline and quant else None
        sides = tuple(lm.read(path) if path else None for path in (self.lm_baseline, self.lm_quant))
        return Measured(baseline, quant, paired, read_kld(self.kld) if self.kld else None, _tasks(*sides))


@dataclass(frozen=True, slots=True)
class Measured:
    """The results that were read; `paired` compares the two GSM8K results question by question."""

    baseline: Gsm8k | None
    quant: Gsm8k | None
    paired: Comparison | None
    kld: Kld | None
    tasks: Tasks | None = None


def _tasks(base: lm.Result | None, quant: lm.Result | None) -> Tasks | None:
    """Put two results of the harness side by side, or show the one there is."""
    found = quant or base
    if found is None:
        return None
    compared = compare_lm(base, quant) if base and quant else None
    differences = (
        {(row.name, row.metric): row.paired.summary for row in compared.rows if row.paired} if compared else {}
    )
    rows = tuple(
        Scored(
            row.name,
            metric.name,
            *found.asked(row),
            (_metric(base, row.name, metric.name), _metric(quant, row.name, metric.name)),
            differences.get((row.name, metric.name), ""),
        )
        for row in found.rows
        for metric in row.metrics
    )
    protocol = found.protocol
    harness = found.versions.get("lm-eval", "")
    return Tasks(harness, protocol.chat, protocol.limit, rows, compared.verdict if compared else "")


def _metric(result: lm.Result | None, row: str, name: str) -> lm.Metric | None:
    metrics = (metric for each in (result.rows if result else ()) if each.name == row for metric in each.metrics)
    return next((metric for metric in metrics if metric.name == name), None)


def read_gsm8k(path: Path) -> Gsm8k:
    """Read a result of `w8a8 eval gsm8k`. Raises `InvalidResultError` where the file is something else."""
    raw, found = read_checked(path)
    return Gsm8k(
        model=found.model,
        questions=found.questions,
        asked=found.protocol,
        right=found.strict.correct,
        strict=Interval(found.strict.accuracy, *found.strict.interval),
        flexible=Interval(found.flexible.accuracy, *found.flexible.interval),
        cut_off=found.cut_off,
        empty=found.empty,
        errors=found.errors,
        raw=raw,
    )


def read_kld(path: Path) -> Kld:
    """Read a result of `w8a8 eval kld`. Raises `InvalidResultError` where the file is something else."""
    try:
        found = read_json(path, _KldFile)
    except UnfitError as error:
        raise InvalidResultError(
            f"{path}: not a result of `w8a8 eval kld` that this version reads ({error}); run it again with --out"
        ) from error
    return Kld(
        reference=found.reference,
        candidate=found.candidate,
        text=found.text.name,
        tokens=found.tokens,
        float32=found.dtypes == ("float32", "float32"),
        mean=Interval(found.kl.mean, *found.kl.interval),
        median=found.kl.median,
        p99=found.kl.p99,
        max=found.kl.max,
        top1=Interval(found.top1.agreement, *found.top1.interval),
        perplexity_reference=found.perplexity.reference,
        perplexity_candidate=found.perplexity.candidate,
        histogram=tuple(Bar(bin_.start, bin_.end, bin_.count) for bin_ in found.histogram),
        positions=tuple(Bar(band.first, band.last, band.mean_kl) for band in found.positions),
    )


# --- the file of `w8a8 eval kld` ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Text:
    name: str


@dataclass(frozen=True, slots=True)
class _Divergence:
    mean: Number
    median: Number
    p99: Number
    max: Number
    interval: tuple[Number, Number]


@dataclass(frozen=True, slots=True)
class _Agreement:
    agreement: Share
    interval: tuple[Share, Share]

    def __post_init__(self) -> None:
        if self.interval[0] > self.interval[1]:
            raise ValueError("top1.interval ends before it begins")


@dataclass(frozen=True, slots=True)
class _Perplexity:
    reference: Number
    candidate: Number


class _Bin(Struct, frozen=True, rename={"start": "from", "end": "to"}):
    start: Number
    end: Number
    count: Count


@dataclass(frozen=True, slots=True)
class _Band:
    first: Count
    last: Count
    mean_kl: Number


@dataclass(frozen=True, slots=True)
class _KldFile:
    kind: Literal["w8a8.kld"]
    schema: Literal[1]
    reference: str
    candidate: str
    text: _Text
    tokens: Count
    kl: _Divergence
    top1: _Agreement
    perplexity: _Perplexity
    positions: tuple[_Band, ...]
    histogram: tuple[_Bin, ...]
    dtypes: tuple[str | None, ...] = ()
