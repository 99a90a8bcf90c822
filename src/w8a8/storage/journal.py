"""The journal of a long job: JSON lines, each of which is on the disk before the work goes on.

The first line is the job: what is being made from what. Each further line is something that is done. A run that finds
a journal whose first line is its own job goes on behind what it lists; any other journal is another job's. Every line
is checked against the type of the job, or of an entry, so a damaged journal is told from one to go on with.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import msgspec

from w8a8.reading import UnfitError, convert, open_file, parse_json
from w8a8.storage.folders import remove
from w8a8.storage.writer import disk_errors

MAX_LINE_BYTES = 4_000_000
"""Many times the longest answer, and the most that one line of a journal holds."""

J = TypeVar("J")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Noted(Generic[J, E]):
    """What a journal says: its job (None: there is none), what is done, and what is damaged, for people; "": nothing.

    What is damaged is not among what is done.
    """

    job: J | None
    done: Sequence[E] = ()
    damage: str = ""


@dataclass(frozen=True, slots=True)
class Journal(Generic[J, E]):
    """The journal in the file `path`, which need not exist yet, of a `job` and entries of the type `entry`."""

    path: Path
    job: type[J]
    entry: type[E]

    def read(self) -> Noted[J, E]:
        """Read the journal, whatever lies there; a last line that was cut off is left out."""
        job, done, damage = None, list[E](), ""
        try:
            for number, line in enumerate(self._lines(), start=1):
                try:
                    if number == 1:
                        job = convert(parse_json(line), self.job)
                    elif job is not None:
                        done.append(convert(parse_json(line), self.entry))
                except UnfitError:
                    damage = damage or f"line {number} is not what was written"
        except FileNotFoundError:
            pass
        except (OSError, UnfitError) as error:
            damage = getattr(error, "strerror", None) or str(error)
        return Noted(job, done, damage)

    def begin(self, job: J) -> None:
        """Start over with `job`. Raises `DiskFullError` or `UnwritableError`."""
        self.forget()
        self.append(job)

    def append(self, entry: J | E | Mapping[str, Any]) -> None:
        """Add a line, and wait until it is on the disk. Raises `DiskFullError` or `UnwritableError`."""
        line = json.dumps(msgspec.to_builtins(entry), ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with disk_errors(self.path), self.path.open("a+b") as file:
            if last := _unended(file):
                if _is_cut_off(last):
                    file.truncate(file.tell() - len(last))
                else:
                    file.write(b"\n")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Remove the journal, or what lies in its place: the next run starts over. Raises `UnwritableError`."""
        with disk_errors(self.path):
            remove(self.path)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines. Raises `OSError`, and `UnfitError` for what is no file, or has too long a line."""
        if self.path.is_symlink():
            raise UnfitError("a link")
        with open_file(self.path) as raw, io.BufferedReader(raw) as file:
            while line := file.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES:
                    raise UnfitError("a line is too long")
                if line.strip() and not _is_cut_off(line):
                    yield line


def differing(before: object, now: object) -> list[str]:
    """Name the fields in which two jobs of one type differ."""
    return [each.name for each in fields(now) if getattr(before, each.name) != getattr(now, each.name)]  # type: ignore[arg-type]


def _unended(file: IO[bytes]) -> bytes:
    """Return what stands behind the last end of a line, and leave the file at its end."""
    size = file.seek(0, os.SEEK_END)
    for length in (1, MAX_LINE_BYTES):  # most often there is nothing, as the last byte tells
        file.seek(max(0, size - length))
        last = file.read().rpartition(b"\n")[2]
        if not last:
            break
    return last


def _is_cut_off(line: bytes) -> bool:
    """Whether a kill or a full disk cut the last line off: it has no end, and is no JSON."""
    if line.endswith(b"\n"):
        return False
    try:
        parse_json(line)
    except UnfitError:
        return bool(line)
    return False
