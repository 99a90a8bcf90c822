"""The journal of a run of lm-evaluation-harness: a line of JSON per answer, so that a killed run loses none.

Requests are known by their hash, so an answer is found again whatever the order, and equal requests are sent once.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.evals.held import Header, continued, held
from w8a8.storage.journal import Journal

KIND = "w8a8.lm.journal"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request was answered: a text, or the log-probability of one in nats, and whether it is the likeliest."""

    request: str
    seconds: float
    text: str = ""
    logprob: float = 0
    greedy: bool = False


@dataclass
class Answers:
    """An open, locked journal: the answers so far by request, and the seconds that all its runs took together."""

    journal: Journal[Header, Answer]
    started: str
    found: dict[str, Answer]
    damage: str = ""

    @property
    def seconds(self) -> float:
        """The time until the last answer."""
        return max((answer.seconds for answer in self.found.values()), default=0.0)

    def record(self, answer: Answer) -> None:
        """Append an answer, and sync it. Raises DiskFullError, UnwritableError."""
        self.found[answer.request] = answer
        self.journal.append(answer)


@contextmanager
def open_answers(path: Path, *, asking: Mapping[str, Any], started: str, restart: bool) -> Iterator[Answers]:
    """Lock the journal in `path`, and continue it if it is about `asking`; begin it if it is empty or with `restart`.

    Raises UsageError if it is about something else, InvalidResultError if the file is not a journal, TargetBusyError,
    DiskFullError, UnwritableError.
    """
    with held(path, restart=restart) as path:
        journal = Journal(path, Header, Answer)
        header = Header(KIND, 1, started, dict(asking))
        started, noted = continued(journal, header, "eval lm", "everything")
        yield Answers(journal, started, {answer.request: answer for answer in noted.done}, noted.damage)


def hashed(value: Any) -> str:
    """Return the hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
