"""The file of a journal while a run writes it: locked, so that a second run keeps away."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from w8a8.errors import InvalidResultError, TargetBusyError
from w8a8.reading import brief, real
from w8a8.storage.writer import disk_errors


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


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say in which options the run that wrote a journal was another one."""
    found = [name for name in now if before.get(name) != now[name]]
    return ", ".join(f"{name} was {brief(before.get(name))}, not {now[name]}" for name in found) or "other options"
