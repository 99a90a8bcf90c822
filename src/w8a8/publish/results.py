"""Result files of `w8a8 eval`, read for a card or a report: GSM8K scores and KL divergence as checked values.

They are a user's files, perhaps from elsewhere: every number is checked before it is shown. Text in them (questions,
answers, names) stays text, and is only ever shown escaped.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import InvalidResultError
from w8a8.evals.gsm8k import results
from w8a8.evals.gsm8k.compare import Comparison, compare
from w8a8.reading import read_json


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Gsm8k:
    """One model's GSM8K scores; `raw` is the whole result, with its answers, for `w8a8.evals.gsm8k.compare`."""

    model: str
    questions: int
    shots: int
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
class Results:
    """Result files: GSM8K of the original and of the quantized model, and the KL divergence between them."""

    baseline: Path | None = None
    quant: Path | None = None
    kld: Path | None = None

    def read(self) -> "Measured":
        """Read the files there are.

        Raises `InvalidResultError` where one is something else, `UsageError` where the two GSM8K results do not
        compare.
        """
        baseline, quant = (read_gsm8k(path) if path else None for path in (self.baseline, self.quant))
        paired = compare(baseline.raw, quant.raw) if baseline and quant else None
        return Measured(baseline, quant, paired, read_kld(self.kld) if self.kld else None)


@dataclass(frozen=True, slots=True)
class Measured:
    """The results that were read; `paired` compares the two GSM8K results question by question."""

    baseline: Gsm8k | None
    quant: Gsm8k | None
    paired: Comparison | None
    kld: Kld | None


def read_gsm8k(path: Path) -> Gsm8k:
    """Read a result of `w8a8 eval gsm8k`. Raises `InvalidResultError` where the file is something else."""
    raw = results.read(path)
    with _named(path, "gsm8k"):
        result = _Fields(raw)
        return Gsm8k(
            model=result.text("model"),
            questions=result.whole("questions"),
            shots=result.section("protocol").whole("shots"),
            strict=result.section("strict").share("accuracy"),
            flexible=result.section("flexible").share("accuracy"),
            cut_off=result.whole("cut_off"),
            empty=result.whole("empty"),
            errors=result.whole("errors"),
            raw=raw,
        )


def read_kld(path: Path) -> Kld:
    """Read a result of `w8a8 eval kld`. Raises `InvalidResultError` where the file is something else."""
    with _named(path, "kld"):
        result = read_json(path, dict[str, Any])
        if result.get("kind") != "w8a8.kld" or result.get("schema") != 1:
            raise ValueError(f"kind is {result.get('kind')!r} and schema {result.get('schema')!r}")
        return _kld(_Fields(result), float32=result.get("dtypes") == ["float32", "float32"])


@contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InvalidResultError(
            f"{path}: not a result of `w8a8 eval {kind}` that this version reads ({error}); run it again with --out"
        ) from error


def _kld(result: "_Fields", *, float32: bool) -> Kld:
    kl, perplexity = result.section("kl"), result.section("perplexity")
    return Kld(
        reference=result.text("reference"),
        candidate=result.text("candidate"),
        text=result.section("text").text("name"),
        tokens=result.whole("tokens"),
        float32=float32,
        mean=kl.interval("mean"),
        median=kl.number("median"),
        p99=kl.number("p99"),
        max=kl.number("max"),
        top1=result.section("top1").share("agreement"),
        perplexity_reference=perplexity.number("reference"),
        perplexity_candidate=perplexity.number("candidate"),
        histogram=tuple(Bar(b.number("from"), b.number("to"), b.whole("count")) for b in result.rows("histogram")),
        positions=tuple(Bar(b.whole("first"), b.whole("last"), b.number("mean_kl")) for b in result.rows("positions")),
    )


class _Fields:
    """A JSON object whose values are read by name and type; `ValueError` says which one is wrong, and how."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values, self._where = values, where

    def section(self, name: str) -> "_Fields":
        return _Fields(self._get(name, dict), f"{self._where}{name}.")

    def rows(self, name: str) -> list["_Fields"]:
        rows = self._get(name, list)
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{self._where}{name} holds something other than objects")
        return [_Fields(row, f"{self._where}{name}[{i}].") for i, row in enumerate(rows)]

    def text(self, name: str) -> str:
        return str(self._get(name, str))

    def whole(self, name: str) -> int:
        value = int(self._get(name, int))
        if not 0 <= value < 2**53:
            raise ValueError(f"{self._where}{name} is {value}")
        return value

    def number(self, name: str) -> float:
        return self._finite(self._get(name, (int, float)), name)

    def interval(self, name: str) -> Interval:
        ends = self._get("interval", list)
        if len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends):
            raise ValueError(f"{self._where}interval is not two numbers")
        low, high = (self._finite(end, "interval") for end in ends)
        return Interval(self.number(name), low, high)

    def share(self, name: str) -> Interval:
        found = self.interval(name)
        if not 0 <= found.low <= found.high <= 1 or not 0 <= found.value <= 1:
            raise ValueError(f"{self._where}{name} and its interval are not shares of one")
        return found

    def _finite(self, value: float, name: str) -> float:
        if not abs(value) <= sys.float_info.max:  # NaN is not, either
            raise ValueError(f"{self._where}{name} is not a finite number")
        return float(value)

    def _get(self, name: str, kind: type | tuple[type, ...]) -> Any:
        value = self._values.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if value is None else repr(value)[:60]
            raise ValueError(f"{self._where}{name} is {found}")  # noqa: TRY004 - callers catch one error
        return value
