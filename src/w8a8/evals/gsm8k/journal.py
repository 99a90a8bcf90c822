"""What a run has heard so far, one line of JSON for each outcome, so that a killed run loses nothing it had.

The first line says what is being asked of whom. A run that finds a journal with its own first line goes on behind it; a
failed request is asked again; a last line that was cut off by a kill is dropped. A lock keeps a second run away.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from w8a8.errors import InvalidResultError, TargetBusyError, UnwritableError, UsageError
from w8a8.evals.gsm8k.asking import Reply

HEADER_KIND = "w8a8.gsm8k.journal"


@dataclass
class Journal:
    """An open, locked journal."""

    path: Path
    started: str
    file: IO[bytes]
    replies: dict[int, Reply] = field(default_factory=dict)
    seconds: float = 0
    """How long the runs so far took."""

    def append(self, index: int, reply: Reply, seconds: float, about: Mapping[str, Any]) -> None:
        """Write one outcome, with what else there is to say `about` it. Raises `UnwritableError`."""
        self.replies[index] = reply
        line = {
            "index": index,
            **about,
            "answer": reply.text,
            "finish_reason": reply.finish_reason,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "error": reply.error,
            "seconds": round(seconds, 3),
        }
        with _writable(self.path):
            self.file.write(_line(line))


@contextmanager
def open_journal(
    path: Path, *, asking: Mapping[str, Any], started: str, questions: int, restart: bool
) -> Iterator[Journal]:
    """The journal in `path`, begun with what is being asked, or gone on with.

    Raises `UsageError` where something else was being asked (unless `restart`), `InvalidResultError` where the file is
    no journal, `TargetBusyError`, and `UnwritableError`.
    """
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = path.open("a+b", buffering=0)
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetBusyError(
                f"{path}: another run is writing it; wait for that one, or give another --out"
            ) from error
        with _writable(path):
            if restart:
                file.truncate(0)
            file.seek(0)
            content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            file.truncate(len(whole))
            if not whole:
                file.write(_line({"kind": HEADER_KIND, "schema": 1, "started": started, "asking": asking}))
        yield _read(path, whole, file, asking, questions) if whole else Journal(path, started, file)


def _read(path: Path, content: bytes, file: IO[bytes], asking: Mapping[str, Any], questions: int) -> Journal:
    lines = [_parsed(path, number, line) for number, line in enumerate(content.splitlines(), 1)]
    header, outcomes = lines[0], lines[1:]
    if header.get("kind") != HEADER_KIND or not isinstance(header.get("started"), str):
        raise InvalidResultError(f"{path}: not a journal of `w8a8 eval gsm8k`; move it away, or give another --out")
    if header.get("asking") != asking:
        raise UsageError(
            f"{path} was begun differently: {_difference(header.get('asking'), asking)}. Give it the same, or another "
            "--out; --restart begins anew"
        )
    journal = Journal(path, header["started"], file)
    for number, line in enumerate(outcomes, 2):
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
                journal.seconds = max(journal.seconds, seconds)
                if error is None:
                    journal.replies[index] = Reply(text, reason, prompt_tokens, completion_tokens)
            case _:
                raise InvalidResultError(f"{path}, line {number}: not an outcome; --restart begins anew")
    return journal


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidResultError(f"{path}, line {number}: not JSON ({error}); --restart begins anew") from error
    if not isinstance(value, dict):
        raise InvalidResultError(f"{path}, line {number}: not an outcome; --restart begins anew")
    return value


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    before = before if isinstance(before, dict) else {}
    differing = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {before.get(name)}, not {now[name]}" for name in differing) or "other options"


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{path}: {os.strerror(error.errno or 0)}") from error
