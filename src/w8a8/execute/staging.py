"""The hidden folder of an unfinished result, and how it becomes the result.

Beside OUT lies a hidden folder `.OUT.w8a8` with three things: `out/`, which will become OUT by a single rename;
`journal.jsonl`, whose first line says what is being made from what, and each further line that a shard is on the disk;
and `old/`, while an OUT is being replaced. An exclusive lock on the hidden folder keeps a second run away, and the
kernel drops it with the process, however that ends.

A run that finds a journal with its own first line goes on behind the shards it lists. Resuming is by whole shards
because nothing finer would be quicker: the source's SHA-256 has to pass over every byte again either way.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from w8a8.errors import TargetExistsError, UnwritableError, UsageError
from w8a8.execute.shard import ShardRecord
from w8a8.storage.folders import acquire, sync_folder
from w8a8.storage.journal import Journal
from w8a8.storage.writer import disk_errors


@dataclass
class Staging:
    """An open, locked staging folder. Use `claim`, and as a context manager."""

    out: Path
    home: Path
    lock: int
    finished: dict[str, ShardRecord] = field(default_factory=dict)

    @classmethod
    def claim(cls, out: Path, *, overwrite: bool) -> Self:
        """Lock the staging folder of `out`, creating it if need be.

        Raises `TargetExistsError`, `TargetBusyError`, `UnwritableError`, or `UsageError` where `overwrite` would
        remove something that is not a checkpoint.
        """
        home = out.parent / f".{out.name}.w8a8"
        staging = cls(out, home, acquire(home, out))
        try:
            staging._recover()
            staging._check_target(overwrite=overwrite)
        except BaseException:
            staging.__exit__(None, None, None)
            raise
        return staging

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Finish or undo a publishing, remove what is not worth resuming, and drop the lock."""
        try:
            self._recover()
            if not self.folder.exists() or not self._journal.read()[1]:
                shutil.rmtree(self.home, ignore_errors=True)
        finally:
            os.close(self.lock)

    @property
    def folder(self) -> Path:
        """The folder that will become OUT."""
        return self.home / "out"

    def begin(self, job: Mapping[str, Any]) -> str | None:
        """Start `job`, or go on with it where a journal says it was interrupted; `finished` then lists what is done.

        All else in the folder is removed. Returns, where an unfinished run was of another job, a sentence saying what
        differs.
        """
        before, entries = self._journal.read()
        resuming = before == job
        if resuming:
            records = [ShardRecord(**entry) for entry in entries]
            self.finished = {record.name: record for record in records if self._is_whole(record)}
        with disk_errors(self.home):
            if not resuming:
                self._journal.forget()
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            for file in [path for path in self.folder.rglob("*") if path.is_file()]:
                if str(file.relative_to(self.folder)) not in self.finished:
                    file.unlink()
            if not resuming:
                self._journal.begin(job)
        return _difference(before, job) if before is not None and not resuming else None

    def record(self, shard: ShardRecord) -> None:
        """Note that `shard` is whole and synced."""
        self._journal.append(asdict(shard))
        self.finished[shard.name] = shard

    def publish(self) -> None:
        """Make the folder visible as OUT; what was there is removed when the staging folder is left."""
        with disk_errors(self.out):
            for folder in [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]:
                sync_folder(folder)
            if self.out.exists():
                self.out.rename(self._old)
            self.folder.rename(self.out)
            sync_folder(self.out.parent)

    def discard(self) -> None:
        """Forget all shards, so that the next run starts over."""
        self._journal.forget()

    @property
    def _journal(self) -> Journal:
        return Journal(self.home / "journal.jsonl")

    @property
    def _old(self) -> Path:
        return self.home / "old"

    def _is_whole(self, record: ShardRecord) -> bool:
        file = self.folder / record.name
        return file.is_file() and file.stat().st_size == record.size

    def _recover(self) -> None:
        """Finish or undo what a run was doing when it ended while publishing."""
        if not self._old.exists():
            return
        with disk_errors(self._old):
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)

    def _check_target(self, *, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise TargetExistsError(f"{self.out}: is a file; choose another name")
        if self.out.is_mount():
            raise TargetExistsError(f"{self.out}: is a mount point and cannot be replaced; name a new folder inside it")
        try:
            names = {entry.name for entry in self.out.iterdir()}
        except OSError as error:
            raise UnwritableError(f"{self.out}: cannot be read ({error.strerror})") from error
        if not names:
            return
        if not overwrite:
            raise TargetExistsError(f"{self.out}: exists already; --overwrite replaces it once the new one is whole")
        if "config.json" not in names:
            raise UsageError(f"{self.out}: is not a checkpoint (no config.json), so --overwrite will not remove it")


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what sets two jobs apart."""
    changed = [name for name, state in now["sources"].items() if before.get("sources", {}).get(name) != state]
    if changed:
        return f"an interrupted run was made from another {', '.join(sorted(changed))}; starting over"
    options = [key for key in now if before.get(key) != now[key]]
    return f"an interrupted run had another {', '.join(options)}; starting over"
