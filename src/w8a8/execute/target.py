"""OUT in an object store: shards are sent while later ones are made, and the whole becomes visible at the end.

What makes a folder a checkpoint is its config.json, so that comes last, behind the index. Until then a small object
says whose the folder is: a run here has the same token in a file beside its staging folder, so it goes on with what it
has sent, and any other run is refused.
"""

import errno
import json
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from w8a8.checkpoint.reader import INDEX
from w8a8.checkpoint.remote import RemoteFile
from w8a8.checkpoint.stores import Store, StoreFolder
from w8a8.errors import (
    SourceNotFoundError,
    StoreError,
    TargetBusyError,
    TargetExistsError,
    UnwritableError,
    UsageError,
    W8A8Error,
)
from w8a8.execute.shard import ShardRecord
from w8a8.execute.staging import Staging
from w8a8.reading import real
from w8a8.storage.arrivals import Repository
from w8a8.storage.folders import remove
from w8a8.storage.upload import insist, upload
from w8a8.storage.writer import disk_errors, write_whole

CLAIM = ".w8a8-unfinished.json"
MAX_CLAIM_BYTES = 1000


@dataclass
class StoreTarget:
    """A folder in a store that the result is sent to, claimed by the run of the staging folder of `here`.

    It is `whole` where a run of that staging folder ended behind its last step: the result shows, and nothing is sent.
    """

    store: Store
    token: bytes
    departs: bool = True
    whole: bool = False
    _held: Set[str] = frozenset()
    _cleared: bool = False
    _clearing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def claim(cls, url: str, *, overwrite: bool, source: Repository | None = None) -> Self:
        """Claim the folder at `url` for a run in this folder; nothing that is there is touched yet.

        Raises `UsageError`, also where one of it and the `source` lies in the other; `MissingExtraError`, `StoreError`;
        `TargetExistsError`, `TargetBusyError` where another run has claimed it, `UnwritableError` where there is no
        such bucket.
        """
        if url.startswith("hf://"):
            raise UsageError(f"{url}: on the Hub, a result goes to a model's repository: `quantize SRC hf://org/name`")
        store = Store.at(url)
        if isinstance(remote := source and source.remote, StoreFolder) and remote.store.overlaps(store):
            raise UsageError(f"{store.url}: source and target may not contain each other (source: {remote.label})")
        kept = _token(_claim_of(store))
        target = cls(store, kept or json.dumps({"tool": "w8a8", "run": uuid.uuid4().hex}).encode())
        found = target._listing()
        claimed = CLAIM in found
        if claimed and target._claimant() == target.token:
            return target
        if claimed and not overwrite:
            raise TargetBusyError(
                f"{store.url}: another run is writing it, or did, from another folder; --overwrite takes its place"
            )
        if found and not claimed:
            if not overwrite and target._is_own(found):
                return replace(target, whole=True)
            if not overwrite:
                raise target._exists()
            if "config.json" not in found:
                raise UsageError(
                    f"{store.url}: is not a checkpoint (no config.json), so --overwrite will not remove it"
                )
        if not kept:
            write_whole(_claim_of(store), target.token)
        try:
            target._write_claim(new=not claimed)
        except (TargetBusyError, UnwritableError):
            if not kept:
                target._forget()
            raise
        return target

    @property
    def here(self) -> Path:
        """What the result is called here, as long as it is made."""
        return Path(self.store.name)

    def held(self, shards: Sequence[ShardRecord]) -> Set[str]:
        """Those whose objects have the size and the tag that they had when they were sent."""
        found = self._listing()
        self._held = {shard.name for shard in shards if self._is_held(shard, found)}
        return self._held

    def send(self, path: Path, shard: ShardRecord, stopped: Callable[[], bool]) -> str:
        """Send a shard; before the first one, remove what is there of others, and what was sent of it in part."""
        if self.whole:  # and of another job
            raise self._exists()
        self._check_claim()
        with self._clearing:
            if not self._cleared:
                self._clear()
        return self._receipt(upload(self.store, path, shard.name, stopped))

    def finish(self, folder: Path, shards: Sequence[ShardRecord]) -> None:
        """Send the small files, config.json last, where all shards are as they were sent."""
        self._check_claim()
        found = self._listing()
        if lost := [shard.name for shard in shards if not self._is_held(shard, found)]:
            raise StoreError(
                f"{self.store.url}/{lost[0]}: is not what was sent any more; run the same command again to send it anew"
            )
        sent = {shard.name for shard in shards}
        if self.whole:
            self._forget()
            return
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - sent
        for name in sorted(names, key=lambda name: (name == "config.json", name == INDEX, name)):
            upload(self.store, folder / name, name)
        self._remove(CLAIM)
        self._forget()

    def _is_own(self, found: Mapping[str, RemoteFile]) -> bool:
        """Whether what shows is the result of the run of the staging folder here: all of its shards, and no others."""
        shards = Staging.of(real(self.here)).noted().done
        weights = {name for name in found if name.endswith(".safetensors")}
        sent = {shard.name for shard in shards if self._is_held(shard, found)}
        return "config.json" in found and bool(sent) and weights == sent

    def _exists(self) -> TargetExistsError:
        return TargetExistsError(f"{self.store.url}: exists already; --overwrite replaces it")

    def _check_claim(self) -> None:
        """Raise `TargetBusyError` where the folder is not this run's any more."""
        if self.whole:
            return
        if self._claimant() != self.token:
            raise TargetBusyError(f"{self.store.url}: another run has taken this folder meanwhile")

    def _clear(self) -> None:
        """Leave only what this run has sent."""
        for name in self._listing().keys() - self._held - {CLAIM}:
            self._remove(name)
        self._abort()
        self._cleared = True

    def _abort(self) -> None:
        """Abort uploads by parts that a kill has left unfinished, where the store keeps them and lets us see them."""
        system = self.store.system
        if not hasattr(system, "list_multipart_uploads"):
            return
        bucket, prefix, _ = system.split_path(self.store.path(""))
        with suppress(W8A8Error):
            for begun in insist(self.store, "", lambda: system.list_multipart_uploads(bucket)):
                if begun["Key"].startswith(prefix) and "/" not in begun["Key"].removeprefix(prefix):
                    key, number = begun["Key"], begun["UploadId"]
                    insist(self.store, key, partial(system.abort_mpu, bucket, key, number))

    def _forget(self) -> None:
        """Remove the token that is kept here."""
        with disk_errors(self.here):
            remove(_claim_of(self.store))

    def _listing(self) -> Mapping[str, RemoteFile]:
        try:
            return insist(self.store, "", self.store.listing)
        except SourceNotFoundError:
            return {}

    def _claimant(self) -> bytes:
        """The token of the run that has claimed the folder."""
        path = self.store.path(CLAIM)
        with suppress(SourceNotFoundError):
            return bytes(
                insist(self.store, CLAIM, lambda: self.store.system.cat_file(path, start=0, end=MAX_CLAIM_BYTES))
            )
        return b""

    def _write_claim(self, *, new: bool) -> None:
        """Write the token; if it is `new`, only where there is none. Raises `TargetBusyError`."""

        def write(mode: str) -> None:
            try:
                self.store.system.pipe_file(self.store.path(CLAIM), self.token, mode=mode)
            except OSError as error:
                if error.errno == errno.EINVAL:  # what s3fs makes of a precondition that failed
                    raise FileExistsError(CLAIM) from error
                raise

        try:
            insist(self.store, CLAIM, lambda: write("create" if new else "overwrite"))
        except FileExistsError as error:
            if self._claimant() != self.token:  # else the answer to an earlier try was lost
                raise TargetBusyError(f"{self.store.url}: another run has just begun to write it") from error
        except SourceNotFoundError as error:
            raise UnwritableError(f"{self.store.url}: there is no such bucket; make it first") from error

    def _remove(self, name: str) -> None:
        with suppress(SourceNotFoundError):
            insist(self.store, name, lambda: self.store.system.rm_file(self.store.path(name)))

    def _receipt(self, file: RemoteFile) -> str:
        return f"{self.store.url}/{file.name} {file.size} {file.tag}"

    def _is_held(self, shard: ShardRecord, found: Mapping[str, RemoteFile]) -> bool:
        file = found.get(shard.name)
        return file is not None and file.size == shard.size and self._receipt(file) == shard.receipt


def _claim_of(store: Store) -> Path:
    """The file that has the token of the runs in this folder that make a result of this name."""
    return Path(f".{store.name}.w8a8-claim")


def _token(path: Path) -> bytes:
    """The token that is kept in the file at `path`; b"" where there is none."""
    with disk_errors(path):
        there = path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_CLAIM_BYTES
        return path.read_bytes() if there else b""
