"""The files of one pass over the layers, so that an interrupted calibration goes on at the layer it was at.

    layer-00000.safetensors  the tensors that calibration made of a finished layer, by their names in the result
    states-00000.bin         the states that enter the first unfinished layer
    journal.jsonl            the job; then a layer's gains, once its file and the states that leave it are on the disk

A journal of another job, or one whose states are missing, starts the pass over.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from w8a8.recipes.layer import Gain
from w8a8.storage.folders import sync_folder
from w8a8.storage.journal import Journal
from w8a8.storage.writer import disk_errors, write_whole


class LayerJournal:
    """The folder of one pass. `gains` has the gains of each finished layer's groups, in order."""

    def __init__(self, folder: Path, job: Mapping[str, Any], states_bytes: int) -> None:
        """Go on with `job` in `folder`, or start over; a file of states has `states_bytes` bytes.

        Whatever is not finished is removed. Raises `DiskFullError` or `UnwritableError`.
        """
        self.folder, self._job, self._journal = folder, job, Journal(folder / "journal.jsonl")
        noted, entries = self._journal.read()
        self.gains = _gains(entries) if noted == job else []
        self.begun = noted == job and _size(self.states(len(self.gains))) == states_bytes
        with disk_errors(folder):
            if not self.begun:
                self.gains = []
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            finished = {self._journal.path, *self.layers(), self.states(len(self.gains))}
            for file in {*folder.iterdir()} - finished:
                file.unlink()

    def begin(self) -> None:
        """Note that the states before the first layer are on the disk."""
        with disk_errors(self.folder):
            sync_folder(self.folder)
        self._journal.begin(self._job)
        self.begun = True

    def record(self, gains: tuple[Gain, ...]) -> None:
        """Note that the next layer's file, and the states that leave it, are on the disk."""
        with disk_errors(self.folder):
            sync_folder(self.folder)
        self._journal.append([asdict(gain) for gain in gains])
        self.states(len(self.gains)).unlink()
        self.gains.append(gains)

    def layers(self) -> Iterator[Path]:
        """The files of the finished layers, in order."""
        return map(self._layer, range(len(self.gains)))

    def states(self, number: int) -> Path:
        """The file of the states that enter a layer."""
        return self.folder / f"states-{number:05}.bin"

    def store(self, data: bytes) -> None:
        """Write the file of the next layer, and sync it. Raises `DiskFullError` or `UnwritableError`."""
        write_whole(self._layer(len(self.gains)), data)

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number:05}.safetensors"


def _gains(entries: Sequence[Any]) -> list[tuple[Gain, ...]]:
    """The layers' gains as `record` noted them; none if an entry is anything else, which starts the pass over."""
    try:
        return [tuple(Gain(**gain) for gain in entry) for entry in entries]
    except TypeError:
        return []


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
