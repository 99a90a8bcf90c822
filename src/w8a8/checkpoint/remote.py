"""Folders far away, a model on the Hub or a folder in an object store, opened by their headers.

A safetensors header lies at the start of its file and says all that is needed, so range requests fetch the config,
the index and each shard's first bytes, and no more is read than was asked for, whatever the server sends. They are laid
out as a folder whose shards have their true length and nothing behind the header (a sparse file takes no room), and
that folder is opened like any other: the same checks hold, and the safetensors library has its word.
"""

import fcntl
import hashlib
import itertools
import os
import shutil
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING, Protocol, TypeVar

from w8a8.checkpoint.header import MAX_HEADER_BYTES
from w8a8.checkpoint.reader import INDEX, MAX_INDEX_BYTES, require_config, weight_files
from w8a8.checkpoint.session import LONGEST_WAIT_SECONDS
from w8a8.checkpoint.stream import Stopped
from w8a8.errors import W8A8Error
from w8a8.reading import MAX_JSON_BYTES

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")

FIRST_BYTES = 100_000
"""Enough for most headers (huggingface_hub fetches as many)."""

MAX_FILE_BYTES = 2**43
SCRATCH, SCRATCH_SECONDS = "w8a8-headers-", 60
WORKERS = 8

START_ATTEMPTS = 4
"""Times that a server is asked for the start of a file before that is given up: seven seconds, while a person waits."""
BACKOFF_SECONDS = 1.0
"""The first wait before asking again; each further one is twice as long."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file far away: its name in the folder, its bytes, and what tells it from another file of that name.

    `sha256` is that of a large file on the Hub; of a small one there, `blob` is git's: the SHA-1 of a header and the
    bytes. A file in an object store has neither, but a `tag`: whatever the store changes with its content.
    """

    name: str
    size: int
    sha256: str = ""
    blob: str = ""
    tag: str = ""

    @property
    def hash(self) -> str:
        """The hash that the bytes have to have, in hex; "" where none is given."""
        return self.sha256 or self.blob

    def digest(self) -> "_Hash":
        """A hash that has seen what comes before the file's bytes."""
        small = self.blob and not self.sha256
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False) if small else hashlib.sha256()


class NotDeliveredError(Exception):
    """A server did not deliver, and may be asked again after `wait` seconds; with `over`, for all from the start."""

    def __init__(self, reason: str, wait: float = 0.0, *, over: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.over = wait, over


class Remote(Protocol):
    """A folder far away, in one state of it: `HubFolder`, `StoreFolder`."""

    @property
    def label(self) -> str:
        """What messages call it."""

    @property
    def keeper(self) -> str:
        """What messages call who has it."""

    @property
    def error(self) -> type[W8A8Error]:
        """What its failures are."""

    @property
    def name(self) -> str:
        """The name of the checkpoint."""

    @property
    def revision(self) -> str | None:
        """Its commit, where it has one."""

    @property
    def version(self) -> str:
        """What tells this state of it from any other, fit for a file's name."""

    @property
    def files(self) -> Mapping[str, RemoteFile]:
        """What lies in it, by name."""

    def where(self, name: str) -> str:
        """What messages call a file in it."""

    def start(self, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
        """Fetch at most `count` bytes of a file, from `begin` on; return them and its length.

        Raises `W8A8Error`, or `NotDeliveredError` where it may be asked again.
        """

    def body(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """Fetch a file from byte `begin` on. Raises `W8A8Error`, or `NotDeliveredError` where it may be asked again."""


class Scratch(TemporaryDirectory[str]):
    """A folder for headers and small files, which leaves with this object, as do those that killed runs have left.

    A lock on it tells that its run is alive: the kernel drops it, however that ends.
    """

    def __init__(self) -> None:
        for left in Path(gettempdir()).glob(f"{SCRATCH}*"):
            _remove_left(left)
        super().__init__(prefix=SCRATCH)
        lock = os.open(self.name, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_SH)


def _remove_left(folder: Path) -> None:
    """Remove the folder of a run that has ended; a new one may not have its lock yet."""
    with suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(lock)
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > SCRATCH_SECONDS:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextmanager
def called(label: str, folder: str | Path) -> Iterator[None]:
    """Let errors speak of `label`, not of `folder`."""
    try:
        yield
    except W8A8Error as error:
        raise type(error)(str(error).replace(str(folder), label)) from error


def wait(seconds: float, stopped: Callable[[], bool] = lambda: False) -> None:
    """Sleep, within bounds. Raises `Stopped` once `stopped()` holds."""
    end = time.monotonic() + min(seconds, LONGEST_WAIT_SECONDS)
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Stopped
        time.sleep(min(left, 0.2))


def insisted(
    ask: Callable[[], T],
    attempts: int,
    given_up: Callable[[NotDeliveredError], W8A8Error],
    stopped: Callable[[], bool] = lambda: False,
) -> T:
    """Ask up to `attempts` times while it is not delivered, after longer and longer waits.

    Raises what `given_up` makes of the last failure, and `Stopped` once `stopped()` holds.
    """
    for failed in itertools.count(1):
        try:
            return ask()
        except NotDeliveredError as failure:
            if failed == attempts:
                raise given_up(failure) from failure
            wait(max(failure.wait, BACKOFF_SECONDS * 2 ** (failed - 1)), stopped)
    raise AssertionError


def start_of(remote: Remote, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
    """`remote.start`, asked again where it was not delivered. Raises `W8A8Error`."""
    return insisted(
        lambda: remote.start(name, count, begin),
        START_ATTEMPTS,
        lambda failure: remote.error(
            f"{remote.where(name)}: {remote.keeper} did not deliver it ({failure}); "
            "give the same command again to try once more"
        ),
    )


def begun(work: Callable[[], T]) -> Future[T]:
    """Work in a thread that nothing waits for, not even the end of this process, as it would for one of a pool."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever takes the result
            future.set_exception(error)

    threading.Thread(target=run, name="begun", daemon=True).start()
    return future


def lay_out(remote: Remote, folder: Path) -> Sequence[str]:
    """Lay config, index and the shards' headers out in `folder`; return the names of the shards."""
    names = {*remote.files}
    require_config(folder, names)
    for name, limit in (("config.json", MAX_JSON_BYTES), (INDEX, MAX_INDEX_BYTES)):
        if name not in names:
            continue
        content, length = start_of(remote, name, limit)
        if len(content) < length:
            raise remote.error(f"{folder}/{name}: {len(content):,} bytes came, of {length:,}")
        (folder / name).write_bytes(content)
    _, shards = weight_files(folder, {name for name in names if "/" not in name})
    if missing := sorted({*shards} - names):
        raise remote.error(f"{folder}: the index names {missing[0]}, which the repository does not hold")
    _headers(remote, shards, folder)
    return shards


def _headers(remote: Remote, shards: Iterable[str], folder: Path) -> None:
    left, ended, writing = iter(shards), threading.Event(), threading.Lock()

    def shard(name: str) -> None:
        content, length = start_of(remote, name, FIRST_BYTES)
        if len(content) >= 8:
            (header,) = struct.unpack("<Q", content[:8])
            if len(content) < 8 + header <= length and header <= MAX_HEADER_BYTES:
                content, length = start_of(remote, name, 8 + header)
        with writing:
            if ended.is_set():  # one failed, and whose folder this is may remove it
                return
            with (folder / name).open("wb") as file:
                file.write(content)
                file.truncate(length)

    def read() -> None:
        for name in left:  # each reader takes the next
            if ended.is_set():
                return
            shard(name)

    try:
        for reader in as_completed([begun(read) for _ in range(WORKERS)]):
            reader.result()
    finally:
        with writing:
            ended.set()
