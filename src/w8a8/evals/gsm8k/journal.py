"""The journal of a GSM8K run: one line of JSON per outcome, so that a killed run loses no answer.

The first line says which model is asked what. A run that finds a journal with its own first line continues it: it asks
failed requests again, and those whose line is damaged or was cut off by a kill. A lock keeps a second run away. A line
has the answer's text, or, where texts are left out, its marks instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from w8a8.evals.asking import Reply
from w8a8.evals.gsm8k.scoring import Marks
from w8a8.evals.held import Header, continued, held
from w8a8.storage.journal import Journal

HEADER_KIND = "w8a8.gsm8k.journal"


@dataclass(frozen=True, slots=True)
class Line:
    """An outcome: the reply to question `index`, after `seconds` in all; a person finds more about it in its line.

    Without the text of the `answer` it has `marks`.
    """

    index: int
    answer: str | None
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None
    seconds: float
    marks: Marks | None = None

    def __post_init__(self) -> None:
        """Raise `ValueError` for an answer that nothing is known of."""
        if self.answer is None and self.marks is None:
            raise ValueError("neither an answer nor its marks")


@dataclass
class OutcomeJournal:
    """An open, locked journal: the replies so far by question, and the seconds that all its runs took together.

    `marks` has those of replies whose text was left out. `damage` says which of its lines is none, for people.
    """

    journal: Journal[Header, Line]
    started: str
    damage: str = ""
    replies: dict[int, Reply] = field(default_factory=dict)
    marks: dict[int, Marks] = field(default_factory=dict)
    seconds: float = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.journal.path

    def record(
        self, index: int, reply: Reply, seconds: float, about: Mapping[str, Any], marks: Marks | None = None
    ) -> None:
        """Append the reply to question `index` after `seconds` in all, with more `about` it, and sync it.

        `marks` stand for its text, if given. Raises DiskFullError, UnwritableError.
        """
        self.replies[index], self.seconds = reply, seconds
        line = Line(
            index=index,
            answer=None if marks else reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            error=reply.error,
            seconds=round(seconds, 3),
            marks=marks,
        )
        noted = {name: value for name, value in asdict(line).items() if name != "marks" or marks}
        self.journal.append({"index": index, **about, **noted})


@contextmanager
def open_journal(
    path: Path, *, asking: Mapping[str, Any], started: str, questions: int, restart: bool
) -> Iterator[OutcomeJournal]:
    """Lock the journal in `path`, and continue it if it is about `asking`; begin it if it is empty or with `restart`.

    Raises UsageError if it is about something else, InvalidResultError if the file is not a journal, TargetBusyError,
    DiskFullError, UnwritableError.
    """
    with held(path, restart=restart) as path:
        journal = Journal(path, Header, Line)
        header = Header(HEADER_KIND, 1, started, dict(asking))
        started, noted = continued(journal, header, "eval gsm8k", "all questions")
        found = OutcomeJournal(journal, started, noted.damage)
        for line in noted.done:
            if 0 <= line.index < questions:
                found.seconds = max(found.seconds, line.seconds)
                if line.error is None:
                    found.replies[line.index] = Reply(
                        line.answer or "", line.finish_reason, line.prompt_tokens, line.completion_tokens
                    )
                    if line.answer is None and line.marks:
                        found.marks[line.index] = line.marks
            else:
                found.damage = found.damage or f"there is no question {line.index}"
        yield found
