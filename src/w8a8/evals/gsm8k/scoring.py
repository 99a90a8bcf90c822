"""Finds the number that an answer to a GSM8K question gives, in two ways.

Strict takes the number after the last `####`, the format that was asked for. Flexible takes the last number anywhere,
and so scores models that do not keep to the format. Both compare numbers: `$1,080.00`, `1080` and `1080.` are equal.

On answers that keep to the format, both agree with lm-evaluation-harness's `gsm8k` filters
(`tests/evals/gsm8k/test_scoring.py` runs those, and lists where the two differ and why).
"""

import re
from dataclasses import dataclass
from decimal import Decimal

MARK = "####"

_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]])[-−])?"  # behind a digit, a word or a bracket it means subtraction: 10-5
    r"(?:[$€£¥]\s?(?P<minus_inside>[-−])?)?"
    r"(?P<digits>[0-9][0-9,]*(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


@dataclass(frozen=True, slots=True)
class Marks:
    """What a result says of an answer: whether it is right by either score, and whether it is empty."""

    strict: bool = False
    flexible: bool = False
    empty: bool = False


def mark(answer: str, solution: str) -> Marks:
    """Score an answer against the data set's, which ends in `#### <number>`."""
    right = strict(solution)
    return Marks(strict(answer) == right, flexible(answer) == right, not answer.strip())


def strict(answer: str) -> Decimal | None:
    """The first number after the last `####`, None if there is none."""
    _, mark, after = answer.rpartition(MARK)
    found = _NUMBER.search(after) if mark else None
    return _value(found) if found else None


def flexible(answer: str) -> Decimal | None:
    """The last number in the answer, None if there is none."""
    found = None
    for found in _NUMBER.finditer(answer):  # noqa: B007 - the last one is wanted
        pass
    return _value(found) if found else None


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return value.copy_negate() if found["minus"] or found["minus_inside"] else value
