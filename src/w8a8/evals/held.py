"""The journal of a run that asks a model: locked, so that a second run keeps away, and continued by the same run."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from w8a8.errors import InvalidResultError, TargetBusyError, UsageError
from w8a8.reading import brief, real
from w8a8.storage.journal import Journal, Noted
from w8a8.storage.writer import disk_errors

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Header:
    """The first line: which model is asked what, since when."""

    kind: str
    schema: int
    started: str
    asking: dict[str, Any]


@contextmanager
def held(path: Path, *, restart: bool) -> Iterator[Path]:
    """Lock the file `path`, made if there is none and emptied with `restart`; yield where it lies behind all links.

    Raises InvalidResultError if it is no file, TargetBusyError, DiskFullError, UnwritableError.
    """
    path = real(path)  # what a link leads to is written
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise InvalidResultError(f"{path}: not a file; give another --out")
        opened = path.open("ab")
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TargetBusyError(f"{path}: another run is writing it; wait for it, or give another --out") from error
        if restart:
            with disk_errors(path):
                file.truncate(0)
        yield path


def continued(
    journal: Journal[Header, E], header: Header, command: str, everything: str
) -> tuple[str, Noted[Header, E]]:
    """Return since when the run of a journal has asked what `header` says, and what it noted; begin an empty one.

    `command` is the one that writes such journals, and `everything` what it asks. Raises UsageError for a journal about
    something else, InvalidResultError for a file that is no such journal, DiskFullError, UnwritableError.
    """
    path, noted = journal.path, journal.read()
    if noted.job is None and not noted.damage:
        journal.append(header)
        return header.started, noted
    if noted.job is None or noted.job.kind != header.kind:
        raise InvalidResultError(f"{path}: not a journal of `w8a8 {command}`; move it away, or give another --out")
    if noted.job.asking != header.asking:
        raise UsageError(
            f"{path}: the run that wrote it was another one: {_differing(noted.job.asking, header.asking)}; give the "
            f"same options, or another --out, or --restart to ask {everything} again"
        )
    return noted.job.started, noted


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in which options the run that wrote a journal was another one."""
    found = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {brief(before.get(name))}, not {now[name]}" for name in found) or "other options"
