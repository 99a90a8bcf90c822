"""The accuracy section of a card: what was measured, as rows and sentences."""

from dataclasses import dataclass
from typing import Any

from w8a8.publish.results import Gsm8k, Kld, Measured
from w8a8.terminal.wording import plural


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`rows` hold accuracy, 95% interval and count, for the original and the checkpoint; `protocol` says how."""

    rows: tuple[tuple[str, str, str], tuple[str, str, str]]
    protocol: str
    verdict: str
    kld: Kld | None


def accuracy(measured: Measured) -> Accuracy:
    """Put results into words; without one its row says "not measured"."""
    verdict = measured.paired.verdict if measured.paired else ""
    rows = (_row(measured.baseline), _row(measured.quant))
    return Accuracy(rows, _protocol(measured.quant or measured.baseline), verdict, measured.kld)


def _row(result: Gsm8k | None) -> tuple[str, str, str]:
    if result is None:
        return "not measured", "", ""
    strict, right = result.strict, result.raw["strict"]["correct"]
    return f"{strict.value:.2%}", f"{strict.low:.2%} to {strict.high:.2%}", f"{right:,} / {result.questions:,}"


def _protocol(result: Gsm8k | None) -> str:
    """How the questions were asked, as the result file says it."""
    if result is None:
        return ""
    asked = result.raw["protocol"]
    said = [plural(result.questions, "question"), f"{result.shots}-shot", f"{asked.get('endpoint')} API"]
    said += [f"{key} {asked[key]:g}" for key in ("temperature", "max_tokens") if _is_number(asked.get(key))]
    return ", ".join(said)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
