"""Reads back the result of a GSM8K run: a user's file, so that everything in it is checked before it is used."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from w8a8.errors import InvalidResultError, UnreadableError
from w8a8.evals.gsm8k.run import SCORES
from w8a8.reading import Count, Number, UnfitError, convert, read_json

MAX_RESULT_BYTES = 100_000_000

Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Score:
    """The right outcomes, as a number, as a share, and the 95% interval of the share."""

    correct: Count
    accuracy: Share
    interval: tuple[Share, Share]


@dataclass(frozen=True, slots=True)
class Asked:
    """How the questions were asked; comparing looks at all that a file says of it."""

    shots: Count
    endpoint: str = "chat"
    temperature: Number | None = None
    max_tokens: Count | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A question, its right answer, the model's answer, and whether that is right; texts may be left out."""

    index: Count
    gold: str
    strict: bool
    flexible: bool
    question: str | None = None
    answer: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Gsm8kFile:
    """The content of a result file, as far as anything reads it."""

    kind: Literal["w8a8.gsm8k"]
    schema: Literal[1]
    model: str
    protocol: Asked
    questions: Count
    strict: Score
    flexible: Score
    cut_off: Count
    empty: Count
    errors: Count
    outcomes: Annotated[tuple[Answered, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Raise `ValueError` where numbers contradict each other, which the schema's reader reports like the rest."""
        if max(Counter(outcome.index for outcome in self.outcomes).values()) > 1:
            raise ValueError("two outcomes of one question")
        for name in SCORES:
            score: Score = getattr(self, name)
            if score.correct != sum(getattr(outcome, name) for outcome in self.outcomes):
                raise ValueError(f"{name}.correct is not the number of right outcomes")
            if score.interval[0] > score.interval[1]:
                raise ValueError(f"{name}.interval ends before it begins")


def read(path: Path) -> dict[str, Any]:
    """Read the result in `path`, as `Result.to_dict` made it. Raises InvalidResultError naming the first problem."""
    return read_checked(path)[0]


def read_checked(path: Path) -> tuple[dict[str, Any], Gsm8kFile]:
    """Read a result as `read` does, and what of it is checked beside it."""
    try:
        result = read_json(path, dict[str, Any], limit=MAX_RESULT_BYTES)
        return result, convert(result, Gsm8kFile)
    except UnreadableError as error:
        raise InvalidResultError(f"{error}; give a result of `w8a8 eval gsm8k`") from error
    except UnfitError as error:
        raise InvalidResultError(
            f"{path}: not a result of `w8a8 eval gsm8k` that this version reads ({error}); "
            "give another file, or run it again with --out"
        ) from error
