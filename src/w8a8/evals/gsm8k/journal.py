"""The journal of a GSM8K run: one line of JSON per outcome, so that a killed run loses no answer.

The first line says which model is asked what. A run that finds a journal with its own first line continues it: it asks
failed requests again, and drops a last line that a kill cut off. A lock keeps a second run away.
"""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from w8a8.errors import InvalidResultError, TargetBusyError, UsageError
from w8a8.evals.gsm8k.asking import Reply
from w8a8.storage.journal import Journal
from w8a8.storage.writer import disk_errors
from w8a8.texts.files import rows

HEADER_KIND = "w8a8.gsm8k.journal"


@dataclass
class OutcomeJournal:
    """An open, locked journal: the replies so far by question, and the seconds that all its runs took together."""

    journal: Journal
    started: str
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
        self.journal.append(
            {
                "index": index,
                **about,
                "answer": reply.text,
                "finish_reason": reply.finish_reason,
                "prompt_tokens": reply.prompt_tokens,
                "completion_tokens": reply.completion_tokens,
                "error": reply.error,
                "seconds": round(seconds, 3),
            }
        )


@contextmanager
def open_journal(
    path: Path, *, asking: Mapping[str, Any], started: str, questions: int, restart: bool
) -> Iterator[OutcomeJournal]:
    """Lock the journal in `path`, and continue it if it is about `asking`; begin it if it is empty or with `restart`.

    Raises UsageError if it is about something else, InvalidResultError if the file is not a journal, TargetBusyError,
    DiskFullError, UnwritableError.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b")
    with opened as file:
        _lock(file, path)
        with disk_errors(path):
            file.seek(0)
            content = b"" if restart else file.read()
        whole = content[: content.rfind(b"\n") + 1]
        found = _continued(path, whole, asking, questions)
        with disk_errors(path):
            file.truncate(len(whole))
        if found is None:
            found = OutcomeJournal(Journal(path), started)
            found.journal.append({"kind": HEADER_KIND, "schema": 1, "started": started, "asking": asking})
        yield found


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TargetBusyError(f"{path}: another run is writing it; wait for it, or give another --out") from error


def _continued(path: Path, content: bytes, asking: Mapping[str, Any], questions: int) -> OutcomeJournal | None:
    """The journal that `content` holds, None if it is empty."""
    lines = _lines(path, content)
    if not lines:
        return None
    match lines[0][1]:
        case {"kind": str(kind), "started": str(started), **header} if kind == HEADER_KIND:
            before = header.get("asking")
        case _:
            raise InvalidResultError(f"{path}: not a journal of `w8a8 eval gsm8k`; move it away, or give another --out")
    if before != asking:
        raise UsageError(
            f"{path}: the run that wrote it was another one: {_difference(before, asking)}; give the same options, or "
            "another --out, or --restart to ask all questions again"
        )
    found = OutcomeJournal(Journal(path), started)
    for place, line in lines[1:]:
        match line:
            case {
                "index": int(index),
                "answer": str(text),
                "finish_reason": (str() | None) as reason,
                "prompt_tokens": int(prompt_tokens),
                "completion_tokens": int(completion_tokens),
                "error": (str() | None) as error,
                "seconds": (int() | float()) as seconds,
            } if 0 <= index < questions:
                found.seconds = max(found.seconds, seconds)
                if error is None:
                    found.replies[index] = Reply(text, reason, prompt_tokens, completion_tokens)
            case _:
                raise InvalidResultError(f"{place}: not an outcome; --restart asks all questions again")
    return found


def _lines(path: Path, content: bytes) -> list[tuple[str, Any]]:
    try:
        return list(rows(content.decode(), str(path)))
    except UnicodeDecodeError as error:
        problem = f"{path}: not UTF-8 text (byte {error.start})"
        raise InvalidResultError(f"{problem}; --restart asks all questions again") from error
    except UsageError as error:
        raise InvalidResultError(f"{error}; --restart asks all questions again") from error


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    differing = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {before.get(name)}, not {now[name]}" for name in differing) or "other options"
