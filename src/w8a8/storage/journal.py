"""The journal of a long job: JSON lines, each of which is on the disk before the work goes on.

The first line is the job: what is being made from what. Each further line is something that is done. A run that finds
a journal whose first line is its own job goes on behind what it lists; any other journal is another job's.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.storage.writer import disk_errors


@dataclass(frozen=True, slots=True)
class Journal:
    """The journal in the file `path`, which need not exist yet."""

    path: Path

    def read(self) -> tuple[Any, list[Any]]:
        """Return the job, None if there is none, and what is done; a line that was cut off is left out."""
        entries: list[Any] = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entries.append(json.loads(line))
        return (entries[0], entries[1:]) if entries else (None, [])

    def begin(self, job: Mapping[str, Any]) -> None:
        """Start over with `job`. Raises `DiskFullError` or `UnwritableError`."""
        self.forget()
        self.append(job)

    def append(self, entry: Any) -> None:
        """Add a line, and wait until it is on the disk. Raises `DiskFullError` or `UnwritableError`."""
        with disk_errors(self.path), self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # behind an entry that a full disk cut short, this one has its own line
                    file.write(b"\n")
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def forget(self) -> None:
        """Remove the journal: the next run starts over. Raises `UnwritableError`."""
        with disk_errors(self.path):
            self.path.unlink(missing_ok=True)
