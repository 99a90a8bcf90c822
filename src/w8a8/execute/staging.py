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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from w8a8.errors import TargetBusyError, TargetExistsError, UnwritableError, UsageError
from w8a8.execute.shard import ShardRecord
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
        staging = cls(out, home, _lock(home, out))
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
            if not self.folder.exists() or len(self._read_journal()) < 2:
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
        entries = self._read_journal()
        resuming = bool(entries) and entries[0] == job
        if resuming:
            records = [ShardRecord(**entry) for entry in entries[1:]]
            self.finished = {record.name: record for record in records if self._is_whole(record)}
        with disk_errors(self.home):
            if not resuming:
                self._journal.unlink(missing_ok=True)
                shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            for file in [path for path in self.folder.rglob("*") if path.is_file()]:
                if str(file.relative_to(self.folder)) not in self.finished:
                    file.unlink()
            if not resuming:
                self._append(job)
        return _difference(entries[0], job) if entries and not resuming else None

    def record(self, shard: ShardRecord) -> None:
        """Note that `shard` is whole and synced."""
        self._append(asdict(shard))
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
        self._journal.unlink(missing_ok=True)

    @property
    def _journal(self) -> Path:
        return self.home / "journal.jsonl"

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

    def _append(self, entry: Mapping[str, Any]) -> None:
        # The newline comes first: behind an entry that a full disk cut short, this one still has its own line.
        with disk_errors(self._journal), self._journal.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(entry))
            file.flush()
            os.fsync(file.fileno())

    def _read_journal(self) -> list[dict[str, Any]]:
        """The journal's entries, without any that was not written whole."""
        entries: list[dict[str, Any]] = []
        if self._journal.exists():
            for line in self._journal.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError):
                    entries.append(json.loads(line))
        return entries


def _lock(home: Path, out: Path) -> int:
    """Make and lock the folder `home`; the lock lasts until the returned descriptor is closed."""
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        # It is gone, or another by now, where a run has just ended and removed it.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = os.open(home, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), home.stat()):
                    return os.dup(lock)  # shares the lock
            finally:
                os.close(lock)
    raise TargetBusyError(f"{out}: another run is writing it now; wait for it, or stop it first")


@contextmanager
def lock_folder(home: Path, out: Path) -> Iterator[None]:
    """Make and lock the folder `home`, on which `out` depends. Raises `TargetBusyError` or `UnwritableError`."""
    lock = _lock(home, out)
    try:
        yield
    finally:
        os.close(lock)


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
