"""Where a calibration keeps what is done, and how it goes on.

Of one pass over the layers, a folder holds `layer-00000.safetensors` and so on, what each finished layer came to, by
the tensors' names in the result; `states-00000.bin`, what enters the first unfinished one; and `journal.jsonl`, whose
first line says what is being made from what, and each further one that a layer, and the states behind it, are on
the disk. A journal that begins with another first line is another job's, and the pass starts over.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w8a8.recipes.layer import Gain
from w8a8.storage.folders import sync_folder
from w8a8.storage.writer import disk_errors


class Journal:
    """What is done of one pass; `gains` has what each finished layer's groups gained, in order."""

    def __init__(self, folder: Path, job: Mapping[str, Any], states_bytes: int) -> None:
        """Open or begin it in `folder`; files of states have `states_bytes` bytes. Raises the errors of a full disk."""
        self.folder, self.gains = folder, list[tuple[Gain, ...]]()
        entries = self._read()
        if entries and entries[0] == job:
            self.gains = _gains(entries[1:])
        self.begun = bool(entries) and entries[0] == job and self._whole(self.states(len(self.gains)), states_bytes)
        with disk_errors(folder):
            if not self.begun:
                self.gains = []
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            for file in folder.glob("states-*.bin"):
                if file != self.states(len(self.gains)):
                    file.unlink()
        self._job = job

    def begin(self) -> None:
        """Note that the states before the first layer are on the disk."""
        self._append(self._job)
        self.begun = True

    def record(self, gains: tuple[Gain, ...]) -> None:
        """Note that the next layer is on the disk, and what is behind it."""
        self._append([asdict(gain) for gain in gains])
        self.states(len(self.gains)).unlink()
        self.gains.append(gains)

    def layer(self, number: int) -> Path:
        """The file of a finished layer."""
        return self.folder / f"layer-{number:05}.safetensors"

    def states(self, number: int) -> Path:
        """The file of the states that enter a layer."""
        return self.folder / f"states-{number:05}.bin"

    def store(self, number: int, data: bytes) -> None:
        """Write a layer's file, and sync it."""
        path = self.layer(number)
        with disk_errors(path), path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    @property
    def _path(self) -> Path:
        return self.folder / "journal.jsonl"

    def _append(self, entry: Any) -> None:
        with disk_errors(self._path):
            sync_folder(self.folder)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(entry))
                file.flush()
                os.fsync(file.fileno())

    def _read(self) -> list[Any]:
        """The entries, without any that was not written whole."""
        entries: list[Any] = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entries.append(json.loads(line))
        return entries

    @staticmethod
    def _whole(path: Path, nbytes: int) -> bool:
        return path.is_file() and path.stat().st_size == nbytes


def _gains(entries: Sequence[Any]) -> list[tuple[Gain, ...]]:
    """The layers' gains as `record` noted them; none where an entry is something else, which starts the pass over."""
    try:
        return [tuple(Gain(**gain) for gain in entry) for entry in entries]
    except TypeError:
        return []
