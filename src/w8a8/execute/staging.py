"""Where an unfinished result lives, and how it becomes the result.

Beside OUT lies a hidden folder `.OUT.w8a8` with three things: `out/`, which will become OUT by a single rename;
`journal.jsonl`, whose first line says what is being made from what, and each further line that a shard is on the disk;
and `old/`, while an OUT is being replaced. An exclusive lock on the hidden folder keeps a second run away, and the
kernel drops it with the process, however that ends.

A run that finds a journal with its own first line goes on behind the shards it lists. Resuming is by whole shards
because nothing finer would be quicker: the source's SHA-256 has to pass over every byte again either way.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from w8a8.errors import TargetBusyError, TargetExistsError, UnwritableError, UsageError
from w8a8.execute.shard import ShardRecord
from w8a8.execute.writer import disk_errors


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
        with disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
            lock = os.open(home, os.O_RDONLY)
        staging = cls(out, home, lock)
        try:
            staging._lock()
            staging._recover()
            staging._check_target(overwrite=overwrite)
        except BaseException:
            staging.__exit__(None, None, None)
            raise
        return staging

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Drop the lock, and the folder too if nothing in it is worth resuming."""
        if self._locked() and not self.finished and not self._journal.exists():
            shutil.rmtree(self.home, ignore_errors=True)
        os.close(self.lock)

    @property
    def folder(self) -> Path:
        """The folder that will become OUT."""
        return self.home / "out"

    def begin(self, job: Mapping[str, Any]) -> str | None:
        """Start `job`, or go on with it where a journal says it was interrupted; `finished` then lists what is done.

        Returns, where an unfinished run was of another job, a sentence saying what differs; its files are removed.
        """
        entries = self._read_journal()
        if entries and entries[0] == job:
            for entry in entries[1:]:
                record = ShardRecord(**entry)
                file = self.folder / record.name
                if file.is_file() and file.stat().st_size == record.size:
                    self.finished[record.name] = record
            return None
        with disk_errors(self.home):
            shutil.rmtree(self.folder, ignore_errors=True)
            self._journal.unlink(missing_ok=True)
            self.folder.mkdir()
            self._append(job)
        return _difference(entries[0], job) if entries else None

    def record(self, shard: ShardRecord) -> None:
        """Note that `shard` is whole and synced."""
        self._append(asdict(shard))
        self.finished[shard.name] = shard

    def publish(self) -> None:
        """Make the folder visible as OUT, replacing what was there, and remove the staging folder."""
        with disk_errors(self.out):
            sync_folder(self.folder)
            if self.out.exists():
                os.rename(self.out, self._old)
            os.rename(self.folder, self.out)
            sync_folder(self.out.parent)
            shutil.rmtree(self.home)

    @property
    def _journal(self) -> Path:
        return self.home / "journal.jsonl"

    @property
    def _old(self) -> Path:
        return self.home / "old"

    def _lock(self) -> None:
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetBusyError(f"{self.out}: another run is writing it now; wait for it, or stop it first") from None
        if not self._locked():
            raise TargetBusyError(f"{self.out}: another run has just finished it; look at the result first")

    def _locked(self) -> bool:
        """Whether the locked folder is still the one at its path, and not one that was published and removed."""
        mine = os.fstat(self.lock)
        return self.home.exists() and os.stat(self.home).st_ino == mine.st_ino and mine.st_nlink > 0

    def _recover(self) -> None:
        """Finish or undo what a run was doing when it died while publishing."""
        if not self._old.exists():
            return
        with disk_errors(self.out):
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                os.rename(self._old, self.out)

    def _check_target(self, *, overwrite: bool) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise TargetExistsError(f"{self.out}: is a file; choose another name")
        try:
            names = os.listdir(self.out)
        except OSError as error:
            raise UnwritableError(f"{self.out}: cannot be read ({error.strerror})") from error
        if not names:
            return
        if not overwrite:
            raise TargetExistsError(f"{self.out}: exists already; --overwrite replaces it once the new one is whole")
        if "config.json" not in names:
            raise UsageError(f"{self.out}: is not a checkpoint (no config.json), so --overwrite will not remove it")

    def _append(self, entry: Mapping[str, Any]) -> None:
        with disk_errors(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's entries, up to the first that was not written whole."""
        entries: list[dict[str, Any]] = []
        if self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8").splitlines():
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    break
        return entries


def sync_folder(folder: Path) -> None:
    """Sync a folder's own entries (names, not contents)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What sets two jobs apart, as a sentence."""
    changed = [name for name, state in now["sources"].items() if before.get("sources", {}).get(name) != state]
    if changed:
        return f"an interrupted run was made from another {', '.join(sorted(changed))}; starting over"
    options = [key for key in now if before.get(key) != now[key]]
    return f"an interrupted run had another {', '.join(options)}; starting over"
