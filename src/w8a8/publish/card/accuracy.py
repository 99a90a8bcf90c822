"""The accuracy section of a card: what was measured, as rows and sentences."""

from dataclasses import dataclass

from w8a8.publish.results import Gsm8k, Kld, Measured, Tasks
from w8a8.terminal.wording import plural


@dataclass(frozen=True, slots=True)
class Accuracy:
    """`rows` hold accuracy, 95% interval and count, for the original and the checkpoint; `protocol` says how."""

    rows: tuple[tuple[str, str, str], tuple[str, str, str]]
    protocol: str
    verdict: str
    kld: Kld | None
    tasks: Tasks | None


def accuracy(measured: Measured) -> Accuracy:
    """Put results into words; without one its row says "not measured"."""
    verdict = measured.paired.verdict if measured.paired else ""
    rows = (_row(measured.baseline), _row(measured.quant))
    return Accuracy(rows, _protocol(measured.quant or measured.baseline), verdict, measured.kld, measured.tasks)


def _row(result: Gsm8k | None) -> tuple[str, str, str]:
    if result is None:
        return "not measured", "", ""
    strict = result.strict
    return f"{strict.value:.2%}", f"{strict.low:.2%} to {strict.high:.2%}", f"{result.right:,} / {result.questions:,}"


def _protocol(result: Gsm8k | None) -> str:
    """How the questions were asked, as the result file says it."""
    if result is None:
        return ""
    asked = result.asked
    said = [plural(result.questions, "question"), f"{asked.shots}-shot", f"{asked.endpoint} API"]
    numbers = {"temperature": asked.temperature, "max_tokens": asked.max_tokens}
    said += [f"{name} {value:g}" for name, value in numbers.items() if value is not None]
    return ", ".join(said)
