"""The files of one pass over the layers, so that an interrupted calibration goes on at the layer it was at.

    layer-00000.safetensors  the tensors that calibration made of a finished layer, by their names in the result
    states-00000.bin         the states that enter the first unfinished layer
    journal.jsonl            the job; then a line per finished layer, once its file and the states that leave it are on
                             the disk, with its gains and the SHA-256 of both; layer 0 stands for the beginning

A journal of another job, or one whose files are not what was written, starts the pass over.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from w8a8.checkpoint.stream import Identity, file_sha256, is_whole
from w8a8.recipes.layer import Gain
from w8a8.storage.folders import keep_only, sync_folder
from w8a8.storage.journal import Journal, differing
from w8a8.storage.writer import disk_errors, write_whole


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides a calibration: this version, options, text and plan, and the source files as they are now."""

    version: str
    recipe: str
    samples_and_plan: str
    sources: dict[str, Identity]
    device: str


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A number of finished layers: the last one's gains and file, and the states that leave it."""

    layers: int
    gains: tuple[Gain, ...]
    size: int
    sha256: str
    states_size: int
    states_sha256: str


class LayerJournal:
    """The folder of one pass. `gains` has the gains of each finished layer's groups, in order.

    `lost` says why an interrupted pass is started over, for people; "" where it is not.
    """

    def __init__(self, folder: Path, job: Job) -> None:
        """Go on with `job` in `folder`, or start over.

        Whatever is not finished is removed. Raises `DiskFullError` or `UnwritableError`.
        """
        self.folder, self._job = folder, job
        self._journal = Journal(folder / "journal.jsonl", Job, LayerRecord)
        noted = self._journal.read()
        records = [*{record.layers: record for record in noted.done}.values()]
        self.gains: list[tuple[Gain, ...]] = []
        self.lost = noted.damage
        if noted.job is not None and not self.lost:
            self.lost = self._difference(noted.job, records)
        self.begun = bool(records) and not self.lost
        if self.begun:
            self.gains = [record.gains for record in records[1:]]
        kept = {self._journal.path, *self.layers(), self.states(len(self.gains))} if self.begun else set()
        with disk_errors(folder):
            keep_only(folder, {path.name for path in kept})

    def begin(self) -> None:
        """Note that the states before the first layer are on the disk."""
        with disk_errors(self.folder):
            sync_folder(self.folder)
        self._journal.begin(self._job)
        states = self.states(0)
        self._journal.append(LayerRecord(0, (), 0, "", states.stat().st_size, file_sha256(states)))
        self.begun = True

    def record(self, gains: tuple[Gain, ...]) -> None:
        """Note that the next layer's file, and the states that leave it, are on the disk."""
        with disk_errors(self.folder):
            sync_folder(self.folder)
        number = len(self.gains)
        layer, states = self._layer(number), self.states(number + 1)
        self._journal.append(
            LayerRecord(
                number + 1,
                gains,
                layer.stat().st_size,
                file_sha256(layer),
                states.stat().st_size,
                file_sha256(states),
            )
        )
        with disk_errors(self.folder):
            self.states(number).unlink()
        self.gains.append(gains)

    def layers(self) -> Iterator[Path]:
        """The files of the finished layers, in order."""
        return map(self._layer, range(len(self.gains)))

    def states(self, number: int) -> Path:
        """The file of the states that enter a layer."""
        return self.folder / f"states-{number:05}.bin"

    def store(self, data: bytes) -> None:
        """Write the file of the next layer, and sync it. Raises `DiskFullError` or `UnwritableError`."""
        write_whole(self._layer(len(self.gains)), data, resumable=True)

    def _layer(self, number: int) -> Path:
        return self.folder / f"layer-{number:05}.safetensors"

    def _difference(self, before: Job, records: list[LayerRecord]) -> str:
        """Say why the pass of the job `before` cannot be gone on with; "" if it can."""
        if options := differing(before, self._job):
            return f"it had another {', '.join(options)}"
        for number, record in enumerate(records):
            if record.layers != number:
                return f"layer {number} is missing in its journal"
            if number and not is_whole(self._layer(number - 1), record.size, record.sha256):
                return f"{self._layer(number - 1).name} is not what was written"
        states = self.states(len(records) - 1)
        if records and not is_whole(states, records[-1].states_size, records[-1].states_sha256):
            return f"{states.name} is not what was written"
        return ""
