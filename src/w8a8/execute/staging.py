"""The hidden folder of an unfinished result, and how it becomes the result.

Beside OUT lies a hidden folder `.OUT.w8a8` with `out/`, which will become OUT by a single rename; `journal.jsonl`,
whose first line says what is being made from what, and each further line that a shard is on the disk, or was sent to
where the result goes; `source/`, where source files arrive; and `old/`, while an OUT is being replaced. An exclusive
lock on the hidden folder keeps a second run away, and the kernel drops it with the process, however that ends.

A run that finds a journal with its own first line goes on behind the shards it lists, where they still have the
SHA-256 it noted. Resuming is by whole shards: a part of one has no SHA-256 yet. Of a shard that was sent and left the
disk, a file of its length with only its header stays.

An empty OUT is not replaced but filled, so that it stays the folder it was (its mode, and the shell that stands in it):
`filling.jsonl` lists its files, of which config.json comes last. Killed before that, the next run takes them back.
"""

import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from w8a8.checkpoint.reader import INDEX
from w8a8.checkpoint.stream import Identity, file_sha256, is_whole
from w8a8.errors import TargetExistsError, UnwritableError, UsageError
from w8a8.execute.delivery import HERE, Delivery
from w8a8.execute.shard import ShardRecord
from w8a8.execute.workers import each
from w8a8.storage.folders import acquire, keep_only, remove, sync_folder, taken
from w8a8.storage.journal import Journal, Noted, differing
from w8a8.storage.writer import disk_errors, write_stub


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the result's bytes: this version, the plan, and the source files as they are now."""

    version: str
    format: str
    recipe: str
    plan: str
    sources: dict[str, Identity]


@dataclass
class Staging:
    """An open, locked staging folder. Use `claim`, and as a context manager."""

    out: Path
    home: Path
    lock: int = -1
    finished: dict[str, ShardRecord] = field(default_factory=dict)
    _noting: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, out: Path) -> Self:
        """The staging folder of `out`, which need not be there, not locked."""
        return cls(out, out.parent / f".{out.name}.w8a8")

    @classmethod
    def claim(cls, out: Path, *, overwrite: bool, appears: bool = True) -> Self:
        """Lock the staging folder of `out`, creating it if need be; `appears` says that `out` itself will be made.

        Raises `TargetExistsError`, `TargetBusyError`, `UnwritableError`, or `UsageError` where `overwrite` would
        remove something that is not a checkpoint.
        """
        staging = cls.of(out)
        staging.lock = acquire(staging.home, out)
        try:
            staging._recover()
            if appears:
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
            if not self.folder.exists() or not (self._journal.read().done or self.arrived()):
                shutil.rmtree(self.home, ignore_errors=True)
        finally:
            os.close(self.lock)

    @property
    def folder(self) -> Path:
        """The folder that will become OUT."""
        return self.home / "out"

    @property
    def arrivals(self) -> Path:
        """The folder for source files that have to arrive first."""
        return self.home / "source"

    def arrived(self) -> int:
        """The bytes of source files that have arrived, whole or in part, and were not used yet; also beside a run."""
        names = [Path(place) / name for place, _, files in os.walk(self.arrivals) for name in files]
        return sum(taken(path) for path in names if path.suffix == ".part" or _is_dense(path))

    def noted(self) -> Noted[Job, ShardRecord]:
        """What the journal says."""
        return self._journal.read()

    def begin(self, job: Job, source: Path, workers: int = 1, delivery: Delivery = HERE) -> str | None:
        """Start `job` from the files in `source`, or go on where a journal says that it was interrupted.

        `finished` then lists what is done, and still is what was written, here or, where shards depart, at the
        `delivery`, with a receipt where that has it; all else in the folder is removed. Returns a sentence for the user
        where an unfinished run was of another job, or something of it is damaged.
        """
        noted = self.noted()
        records = {record.name: record for record in noted.done if record.name in job.sources}
        reason = ""
        if noted.damage:
            reason = f"the journal of an interrupted run is damaged ({noted.damage})"
        elif noted.job is not None:
            reason = _difference(noted.job, job, source, records, workers)
        resuming = noted.job is not None and not reason
        if resuming:
            sent = [record for record in records.values() if record.receipt]
            held = delivery.held(sent) if sent else set[str]()
            whole = set(held) if delivery.departs else set[str]()
            here = records.keys() - whole
            whole |= _those(here, lambda name, stopped: self._is_whole(records[name], stopped), workers)
            self.finished = {
                name: record if name in held else replace(record, receipt="")
                for name, record in records.items()
                if name in whole
            }
        with disk_errors(self.home):
            keep_only(self.folder, self.finished)
            if not resuming:
                self._journal.begin(job)
        if reason:
            return f"{reason}; starting over"
        damaged = ", ".join(sorted(records.keys() - self.finished.keys()))
        return f"{damaged}: not what an interrupted run wrote any more; made again" if damaged else None

    def record(self, shard: ShardRecord) -> None:
        """Note that `shard` is whole and synced, or was sent: then it has a receipt."""
        with self._noting:
            self._journal.append(shard)
            self.finished[shard.name] = shard

    def depart(self, name: str, header: bytes) -> None:
        """Leave of a shard that was sent a file of its length with only its `header`, as it may be there already."""
        write_stub(self.folder / name, [(0, header)], self.finished[name].size)

    def publish(self) -> None:
        """Make the folder visible as OUT; what was there is removed when the staging folder is left."""
        with disk_errors(self.out):
            for folder in [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]:
                sync_folder(folder)
            if self.out.exists() and not any(self.out.iterdir()):
                self._fill()
            else:
                if self.out.exists():
                    _take_rights(self.out, self.folder)
                    self.out.rename(self._old)
                self.folder.rename(self.out)
            sync_folder(self.out.parent)

    def drop(self) -> None:
        """Forget the result, which lies elsewhere now: nothing stays when the staging folder is left."""
        with disk_errors(self.home):
            remove(self.folder)

    def discard(self) -> None:
        """Forget all shards, so that the next run starts over."""
        self._journal.forget()

    @property
    def _journal(self) -> Journal[Job, ShardRecord]:
        return Journal(self.home / "journal.jsonl", Job, ShardRecord)

    @property
    def _filling(self) -> Journal[list[str], str]:
        """Its job is the names of the files and folders that OUT is filled with, in order."""
        return Journal(self.home / "filling.jsonl", list[str], str)

    @property
    def _old(self) -> Path:
        return self.home / "old"

    def _is_whole(self, record: ShardRecord, stopped: Callable[[], bool]) -> bool:
        return is_whole(self.folder / record.name, record.size, record.sha256, stopped)

    def _fill(self) -> None:
        """Move what lies in the folder into OUT."""
        names = sorted(
            (path.name for path in self.folder.iterdir()), key=lambda name: (name == "config.json", name == INDEX, name)
        )
        self._filling.begin(names)
        for name in names:
            (self.folder / name).rename(self.out / name)
        sync_folder(self.out)
        self.folder.rmdir()

    def _recover(self) -> None:
        """Finish or undo what a run was doing when it ended while publishing."""
        with disk_errors(self.out):
            names = [name for name in self._filling.read().job or () if Path(name).name == name]
            if names and not (self.out / names[-1]).exists():
                self.folder.mkdir(exist_ok=True)
                for name in names:
                    with suppress(FileNotFoundError):
                        (self.out / name).rename(self.folder / name)
            self._filling.forget()
            if self._old.is_dir() and not self._old.is_symlink() and not self.out.exists():
                self._old.rename(self.out)
            else:
                remove(self._old)

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
            if not os.access(self.out, os.W_OK | os.X_OK):
                raise UnwritableError(f"{self.out}: no permission to write into it")
            return
        if not overwrite:
            raise TargetExistsError(f"{self.out}: exists already; --overwrite replaces it once the new one is whole")
        if "config.json" not in names:
            raise UsageError(f"{self.out}: is not a checkpoint (no config.json), so --overwrite will not remove it")
        if _here().is_relative_to(self.out):
            raise UsageError(f"{self.out}: you are in this folder, which --overwrite replaces; go to another one first")


def _difference(before: Job, now: Job, source: Path, records: Mapping[str, ShardRecord], workers: int) -> str:
    """Say what sets two jobs apart; "" if nothing does.

    A source file that is another, or was touched, but has the same size and time as before, is the same where its
    SHA-256 is known to be the one that its shard was made from; where its shard is not made yet, it does not matter.
    """
    changed = {name for name, file in now.sources.items() if not _looks_alike(before.sources.get(name), file)}
    options = [name for name in differing(before, now) if name != "sources"]
    if not changed and not options:
        doubted = {name for name in records if before.sources[name] != now.sources[name]}
        whole = {name for name in doubted if records[name].source_sha256}
        same = _those(whole, lambda name, s: file_sha256(source / name, s) == records[name].source_sha256, workers)
        changed = whole - same
        if not changed and doubted - whole:
            return f"an interrupted run may have been made from another {', '.join(sorted(doubted - whole))}"
    if changed:
        return f"an interrupted run was made from another {', '.join(sorted(changed))}"
    return f"an interrupted run had another {', '.join(options)}" if options else ""


def _looks_alike(before: Identity | None, now: Identity) -> bool:
    return before is not None and (before.size, before.mtime_ns) == (now.size, now.mtime_ns)


def _those(names: Iterable[str], hold: Callable[[str, Callable[[], bool]], bool], workers: int) -> set[str]:
    """Return the names for which `hold(name, stopped)` is true."""
    found = set()

    def look(name: str, stopped: Callable[[], bool]) -> None:
        if hold(name, stopped):
            found.add(name)

    each(names, look, workers)
    return found


def _is_dense(path: Path) -> bool:
    """Whether a shard takes as much room as it has bytes."""
    try:
        return path.suffix == ".safetensors" and taken(path) >= path.stat().st_size
    except FileNotFoundError:
        return False


def _take_rights(like: Path, folder: Path) -> None:
    """Give `folder` the owner, as far as this user may, and the mode of the folder `like`."""
    status = like.stat()
    with suppress(PermissionError):
        os.chown(folder, status.st_uid, status.st_gid)
    folder.chmod(stat.S_IMODE(status.st_mode))


def _here() -> Path:
    """Return the folder this process is in; "/" where that was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path("/")
