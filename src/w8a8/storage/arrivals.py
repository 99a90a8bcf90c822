"""A folder far away as one here, whose shards arrive when they are needed, and leave when they are done with.

The folder holds config, small files, and for each shard a file of its length with nothing behind the header (a sparse
file takes no room), so it opens and plans like any other. Its bytes arrive in a file beside that, which is read while
it grows; meanwhile the next ones are downloaded. What is held, or on its way, stays within a budget of bytes. What
lies in one shard beside tensors of another (the scales of some FP8 checkpoints) is there from the start.
"""

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.checkpoint.reader import INDEX, inside
from w8a8.checkpoint.remote import Remote, RemoteFile, Scratch, called, lay_out, start_of
from w8a8.checkpoint.source import needed
from w8a8.checkpoint.stream import ArrivedWrong, Feed, Identity, Stopped, read_exactly
from w8a8.errors import NonFiniteWeightError, SourceChangedError, SourceError, UnreadableError
from w8a8.reading import open_file, reading
from w8a8.storage.download import download, fetch, part_of
from w8a8.storage.folders import remove, taken
from w8a8.storage.writer import disk_errors, write_stub

MAX_SMALL_BYTES = 1 << 30
"""The largest file beside the weights that is fetched; tokenizers have some 30 MB."""
MAX_SMALL_FILES, MAX_BESIDE_BYTES = 10_000, 4 << 30
"""How many such files a repository may have, and their bytes in all."""
POLL_SECONDS = 0.2
"""How often one who waits for a shard looks whether the run was stopped."""

DOUBTFUL = (NonFiniteWeightError, SourceError, SourceChangedError, UnreadableError)
"""What may be wrong with the bytes that came, and not with the file."""


@dataclass(frozen=True)
class Repository:
    """A folder far away, and its checkpoint, laid out in a folder that lasts as long as this.

    Of its shards, only the headers are there.
    """

    remote: Remote
    checkpoint: Checkpoint
    _folder: Scratch = field(repr=False)

    @classmethod
    def open(cls, remote: Remote) -> Self:
        """Fetch headers and small files. Raises what `Remote`, `download` and `Checkpoint.open` raise."""
        folder = Scratch()
        path = Path(folder.name)
        with called(remote.label, path), disk_errors(path, resumable=False):
            shards = lay_out(remote, path)
            for early in {"config.json", INDEX} & {*remote.files}:
                _check(remote, path, early)
            beside = [remote.files[name] for name in needed(remote.files) if name not in shards]
            beside = [file for file in beside if file.size <= MAX_SMALL_BYTES]
            if len(beside) > MAX_SMALL_FILES or sum(file.size for file in beside) > MAX_BESIDE_BYTES:
                raise remote.error(f"{path}: {len(beside):,} files lie beside its weights, more than a model has")
            for small in beside:
                target = inside(path, small.name)
                if target.exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                download(remote, small, target)
            return cls(remote, Checkpoint.open(path), folder)

    def read(self, name: str, begin: int, nbytes: int) -> bytes:
        """Fetch a few bytes of a file. Raises what `start_of` raises."""
        content, _ = start_of(self.remote, name, nbytes, begin)
        if len(content) != nbytes:
            raise self.remote.error(f"{self.remote.where(name)}: {len(content):,} bytes came, of {nbytes:,}")
        return content


def _check(remote: Remote, folder: Path, name: str) -> None:
    """Raise unless the file has the hash that it should have."""
    file, path = remote.files[name], folder / name
    digest = file.digest()
    digest.update(path.read_bytes())
    if file.hash not in ("", digest.hexdigest()):
        raise remote.error(
            f"{path}: its hash is not the one that {remote.keeper} gives for it; give the same command again"
        )


@dataclass(slots=True)
class _Arrival:
    """How far a file has come, and how often all that came was wrong."""

    size: int
    there: int = 0
    wrong: int = 0
    whole: bool = False

    def has(self, end: int | None) -> bool:
        """Whether its bytes up to `end` are there; with None, all of them, and right."""
        return self.whole or (end is not None and self.there >= min(end, self.size))


class Arrivals:
    """The shards of a repository in a folder of its version, within `budget` bytes."""

    def __init__(
        self,
        repository: Repository,
        folder: Path,
        *,
        budget: int,
        beside: Sequence[TensorSpec] = (),
        arrived: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`beside` are tensors to have from the start; `arrived` is told of bytes as they come.

        Raises what `Remote.start` raises, `DiskFullError`, `UnwritableError`.
        """
        self.folder = folder / repository.remote.version
        self._remote, self._files = repository.remote, repository.remote.files
        self._repository, self._budget, self._arrived = repository, budget, arrived
        self._kept = {
            shard.name: [(0, _header(repository.checkpoint.path / shard.name))]
            for shard in repository.checkpoint.shards
        }
        for spec in beside:
            self._kept[spec.shard].append((spec.offset, repository.read(spec.shard, spec.offset, spec.nbytes)))
        self._changed = threading.Condition()
        self._held = self._admitted = 0
        self._left: Counter[str] = Counter()
        self._futures: dict[str, Future[None]] = {}
        self._ended = threading.Event()
        self._arrivals = {name: _Arrival(self._files[name].size) for name in self._kept}
        self._lay_out(folder)

    @property
    def room(self) -> int:
        """The bytes that shards take at most: the budget, or what there is, or the largest of them."""
        sizes = [self._files[name].size for name in self._kept]
        return max(min(self._budget, sum(sizes)), *sizes)

    def checkpoint(self) -> Checkpoint:
        """The repository's checkpoint as it lies in `folder`."""
        return replace(self._repository.checkpoint, path=self.folder)

    def identity(self, name: str) -> Identity:
        """What tells a file from another one of its name: its hash, or its tag, in place of a time."""
        file = self._files[name]
        stamp = hashlib.sha256((file.hash or file.tag).encode()).digest()[:7]
        return Identity(0, file.size, int.from_bytes(stamp), 0)

    def sha256(self, name: str) -> str:
        """The SHA-256 of a file, where it is known: from the start, or since it arrived."""
        noted = self._noted(name)
        return self._files[name].sha256 or (noted.read_text() if noted.is_file() else "")

    @contextmanager
    def running(self, names: Sequence[str], workers: int) -> Iterator[None]:
        """Download `names`, in order, while the context lasts; a name may come several times, once per use."""
        self._left = Counter(names)
        pool = ThreadPoolExecutor(max(2, workers), thread_name_prefix="download")
        try:
            self._futures = {
                name: pool.submit(self._fetch, name, place) for place, name in enumerate(dict.fromkeys(names))
            }
            yield
        finally:
            self._ended.set()
            with self._changed:
                self._changed.notify_all()
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def hold(self, name: str, stopped: Callable[[], bool]) -> Iterator[None]:
        """Wait for a file; behind its last use it leaves. Raises what `download` raises, and `Stopped`."""
        while True:
            if stopped():
                raise Stopped
            try:
                self._futures[name].result(POLL_SECONDS)
                break
            except NotYet:
                continue
        with self._changed:
            if (part := self._part(name)).exists():
                part.replace(self.folder / name)
        yield
        self._release(name)

    @contextmanager
    def feed(self, name: str, stopped: Callable[[], bool]) -> Iterator[Feed]:
        """Give a file while it arrives; behind its last use it leaves. Raises what `fetch` raises, `ArrivedWrong`."""
        feed = Feed(self._part(name), partial(self._ready, name, self._arrivals[name].wrong), stopped)
        try:
            yield feed
        except DOUBTFUL:
            feed.wait()  # what is wrong with a file that came wrong does not matter
            raise
        self._release(name)

    def _ready(self, name: str, wrong: int, end: int | None) -> bool:
        """Whether a file has come up to `end`, or whole, and never wrong more often than `wrong`; waits a moment."""
        arrival, arriving = self._arrivals[name], self._futures[name]
        with self._changed:
            self._changed.wait_for(lambda: arrival.wrong > wrong or arrival.has(end) or arriving.done(), POLL_SECONDS)
            if arrival.wrong > wrong:
                raise ArrivedWrong
            if arriving.done():
                arriving.result()
            return arrival.has(end)

    def _release(self, name: str) -> None:
        """A use of a file has ended; behind its last one it leaves."""
        with self._changed:
            self._left[name] -= 1
            if not self._left[name]:
                self._write_stub(name)
                self._part(name).unlink(missing_ok=True)
                self._held -= self._files[name].size
                self._changed.notify_all()

    def _part(self, name: str) -> Path:
        return part_of(self.folder / name)

    def _fetch(self, name: str, place: int) -> None:
        """Download a file once those before it are on their way, and there is room for it."""
        file, arrival = self._files[name], self._arrivals[name]

        def advance(nbytes: int) -> None:
            with self._changed:
                arrival.there += nbytes
                arrival.wrong += nbytes < 0
                self._changed.notify_all()
            self._arrived(nbytes)

        with self._changed:
            self._changed.wait_for(lambda: self._ended.is_set() or self._may_begin(file, place))
            if self._ended.is_set():
                raise Stopped
            self._admitted += 1
            self._held += file.size
            self._changed.notify_all()
        sha256 = fetch(self._remote, file, self._part(name), advance=advance, stopped=self._ended.is_set)
        self._compare(name)
        if not file.hash:
            with disk_errors(self._noted(name)):
                self._noted(name).write_text(sha256)
        with self._changed:
            arrival.whole = True
            self._changed.notify_all()

    def _compare(self, name: str) -> None:
        """Raise `SourceError` where what was fetched of a file before is not what it holds."""
        path = self._part(name)
        with reading(path), open_file(path) as file:
            for offset, content in self._kept[name]:
                found = bytearray(len(content))
                read_exactly(file.fileno(), memoryview(found), offset, path)
                if found != content:
                    raise SourceError(
                        f"{self._remote.where(name)}: {self._remote.keeper} sent other bytes when it was asked for a "
                        "part of it; give the same command again"
                    )

    def _may_begin(self, file: RemoteFile, place: int) -> bool:
        """Whether all files before it are on their way, and there is room for it: for one there always is."""
        return self._admitted == place and (not self._held or self._held + file.size <= self._budget)

    def _lay_out(self, home: Path) -> None:
        """Put all but the shards' contents into the folder; what an earlier run had downloaded stays."""
        source = self._repository.checkpoint.path
        with disk_errors(self.folder):
            home.mkdir(parents=True, exist_ok=True)
            for entry in home.iterdir():
                if entry != self.folder:
                    remove(entry)
            self.folder.mkdir(exist_ok=True)
            for path in sorted(source.rglob("*")):
                target = self.folder / path.relative_to(source)
                if path.is_dir():
                    target.mkdir(exist_ok=True)
                elif path.name not in self._kept:
                    target.write_bytes(path.read_bytes())
                else:
                    if target.is_file() and taken(target) >= self._arrivals[path.name].size:
                        target.replace(self._part(path.name))  # an earlier run had it whole
                    self._write_stub(path.name)

    def _noted(self, name: str) -> Path:
        """Where the SHA-256 is noted of a file that came without one."""
        return self.folder / f".{name}.sha256"

    def _write_stub(self, name: str) -> None:
        """Put a file of the shard's length in its place, of which only what is always needed is there."""
        write_stub(self.folder / name, self._kept[name], self._files[name].size)


def _header(path: Path) -> bytes:
    """The header of a safetensors file, with its length before it."""
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(int.from_bytes(length, "little"))
