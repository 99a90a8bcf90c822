"""The journal of a GSM8K run: one line of JSON per outcome, so that a killed run loses no answer.

The first line says which model is asked what. A run that finds a journal with its own first line continues it: it asks
failed requests again, and those whose line is damaged or was cut off by a kill. A lock keeps a second run away.
"""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from w8a8.errors import InvalidResultError, TargetBusyError, UsageError
from w8a8.evals.gsm8k.asking import Reply
from w8a8.reading import brief, real
from w8a8.storage.journal import Journal
from w8a8.storage.writer import disk_errors

HEADER_KIND = "w8a8.gsm8k.journal"


@dataclass(frozen=True, slots=True)
class Header:
    """The first line: which model is asked what, since when."""

    kind: str
    schema: int
    started: str
    asking: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """An outcome: the reply to question `index`, after `seconds` in all; a person finds more about it in its line."""

    index: int
    answer: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    error: str | None
    seconds: float


@dataclass
class OutcomeJournal:
    """An open, locked journal: the replies so far by question, and the seconds that all its runs took together.

    `damage` says which of its lines is none, for people.
    """

    journal: Journal[Header, Line]
    started: str
    damage: str = ""
    replies: dict[int, Reply] = field(default_factory=dict)
    seconds: float = 0

    @property
    def path(self) -> Path:
        """The file."""
        return self.journal.path

    def record(self, index: int, reply: Reply, seconds: float, about: Mapping[str, Any]) -> None:
        """Append the reply to question `index` after `seconds` in all, with more `about` it, and sync it.

        Raises DiskFullError, UnwritableError.
        """
        self.replies[index], self.seconds = reply, seconds
        line = Line(
            index=index,
            answer=reply.text,
            finish_reason=reply.finish_reason,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            error=reply.error,
            seconds=round(seconds, 3),
        )
        self.journal.append({"index": index, **about, **asdict(line)})


@contextmanager
def open_journal(
    path: Path, *, asking: Mapping[str, Any], started: str, questions: int, restart: bool
) -> Iterator[OutcomeJournal]:
    """Lock the journal in `path`, and continue it if it is about `asking`; begin it if it is empty or with `restart`.

    Raises UsageError if it is about something else, InvalidResultError if the file is not a journal, TargetBusyError,
    DiskFullError, UnwritableError.
    """
    path = real(path)  # what a link leads to is written
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise InvalidResultError(f"{path}: not a file; give another --out")
        opened = path.open("ab")
    with opened as file:
        _lock(file, path)
        if restart:
            with disk_errors(path):
                file.truncate(0)
        journal = Journal(path, Header, Line)
        found = _continued(journal, asking, questions)
        if found is None:
            journal.append(Header(HEADER_KIND, 1, started, dict(asking)))
            found = OutcomeJournal(journal, started)
        yield found


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TargetBusyError(f"{path}: another run is writing it; wait for it, or give another --out") from error


def _continued(journal: Journal[Header, Line], asking: Mapping[str, Any], questions: int) -> OutcomeJournal | None:
    """What the journal holds, None if it is empty."""
    noted = journal.read()
    if noted.job is None and not noted.damage:
        return None
    if noted.job is None or noted.job.kind != HEADER_KIND:
        problem = f"{journal.path}: not a journal of `w8a8 eval gsm8k`"
        raise InvalidResultError(f"{problem}; move it away, or give another --out")
    if noted.job.asking != asking:
        raise UsageError(
            f"{journal.path}: the run that wrote it was another one: {_difference(noted.job.asking, asking)}; give the "
            "same options, or another --out, or --restart to ask all questions again"
        )
    found = OutcomeJournal(journal, noted.job.started, noted.damage)
    for line in noted.done:
        if 0 <= line.index < questions:
            found.seconds = max(found.seconds, line.seconds)
            if line.error is None:
                found.replies[line.index] = Reply(
                    line.answer, line.finish_reason, line.prompt_tokens, line.completion_tokens
                )
        else:
            found.damage = found.damage or f"there is no question {line.index}"
    return found


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    differing = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {brief(before.get(name))}, not {now[name]}" for name in differing) or "other options"
