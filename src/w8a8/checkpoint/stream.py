"""Reads a file once, front to back: a thread of its own reads, the caller works on the blocks it hands over.

SHA-256 must see a file's bytes in order, and is the slowest thing the quantizer does to a byte (`w8a8 bench quantize`
has it as a row). So the source's, where it is asked for, is made by the thread that reads, on bytes that are still in
cache, and everything else (amax, codes, hashing the output, writing) happens on the other side of the queue. Memory is
the buffers: four per file. A file may still be arriving while it is read: its `Feed` says how far it has come.
"""

import hashlib
import mmap
import os
import queue
import re
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from w8a8.checkpoint import TensorSpec
from w8a8.checkpoint.reader import inside
from w8a8.errors import SourceChangedError, UnreadableError
from w8a8.reading import open_file, reading, real

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK_BYTES = 4 << 20
"""Bytes per read: large enough for any disk, small enough to stay in a core's share of the cache."""

BUFFERS = 4

_SHA256 = re.compile("[0-9a-f]{64}")


class Stopped(Exception):  # noqa: N818 - a signal between threads, never shown
    """Another shard failed, or the user interrupted; this one ends early."""


class ArrivedWrong(Exception):  # noqa: N818 - a signal between threads, never shown
    """What had arrived of a file is not what it holds: it comes once more, and is to be read again from its start."""


@dataclass(frozen=True, slots=True)
class Feed:
    """A file that is read, and may still be arriving: front to back, at `path`.

    `ready(end)` waits a moment for its bytes up to `end`, or, with None, for all of it to be there and to be what it
    should be, and says whether they are. It raises `ArrivedWrong`, and what keeps the file from arriving. Bytes are
    there before they can be trusted: whatever is made of them counts only behind `wait()`.
    """

    path: Path
    ready: Callable[[int | None], bool] = lambda _end: True
    stopped: Callable[[], bool] = lambda: False

    def wait(self, end: int | None = None) -> None:
        """Return once it is ready up to `end`, or whole. Raises what `ready` raises, and `Stopped`."""
        while not self.ready(end):
            if self.stopped():
                raise Stopped


@dataclass(frozen=True, slots=True)
class Identity:
    """A file as it was at one moment: its inode and bytes, and when its content, or anything of it, last changed.

    Times are in nanoseconds. The last one, the ctime, no program can set back.
    """

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Look at the file at `path` now. Raises `UnreadableError`."""
        with reading(path):
            status = path.stat()
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of a file to be read at once: `runs` runs of `nbytes` bytes, from byte `offset` on, one every `stride`.

    `hashed`: they belong to the digest of the file. Such blocks are one run, and follow one another without a gap.
    `passing`: nobody wants its bytes but the digest, so it is read only where there is one, and comes without them.
    `held`: a single run that stays with the reader, and comes without its bytes: the blocks that follow and lie in it
    are cut out of it.
    """

    offset: int
    nbytes: int
    runs: int = 1
    stride: int = 0
    hashed: bool = True
    passing: bool = False
    held: bool = False

    @property
    def size(self) -> int:
        """Bytes of all runs."""
        return self.nbytes * self.runs

    @property
    def reach(self) -> int:
        """The bytes of the file up to the end of its last one."""
        return self.offset + (self.runs - 1) * self.stride + self.nbytes

    def within(self, other: "Block") -> bool:
        """Whether all its bytes lie in the single run of `other`."""
        return other.offset <= self.offset and self.reach <= other.reach


B = TypeVar("B", bound=Block)


def byte_blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Cut the bytes from `begin` to `end` into pieces of at most `BLOCK_BYTES`: offset and number of each."""
    for offset in range(begin, end, BLOCK_BYTES):
        yield offset, min(BLOCK_BYTES, end - offset)


def stream(
    source: Path | Feed, blocks: Iterable[B], stopped: Callable[[], bool] = lambda: False, digest: "_Hash | None" = None
) -> Generator[tuple[B, memoryview], None, None]:
    """Yield each block with its bytes, run after run, which are valid until the next one is asked for.

    Close the generator (`contextlib.closing`) to end its thread early. `digest` is updated with the `hashed` blocks.
    Raises `UnreadableError`, `SourceChangedError` (the file became shorter), `Stopped` (once `stopped()` holds), and
    what the feed of an arriving file raises.
    """
    feed = Feed(source) if isinstance(source, Path) else source
    path, blocks = feed.path, list(blocks)
    size = max((block.size for block in blocks if not block.held), default=1)
    free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[B, mmap.mmap] | BaseException | None] = queue.SimpleQueue()
    for _ in range(min(BUFFERS, len(blocks))):
        free.put(mmap.mmap(-1, size))
    ended = threading.Event()

    def stop() -> bool:
        return stopped() or ended.is_set()

    def read() -> None:
        wait = replace(feed, stopped=stop).wait
        kept, span = mmap.mmap(-1, max((block.size for block in blocks if block.held), default=1)), Block(0, 0)
        try:
            wait(1)
            with reading(path), open_file(path) as file:
                for block in blocks:
                    buffer = free.get()
                    if stop():
                        raise Stopped
                    wait(block.reach)
                    view = memoryview(kept if block.held else buffer)[: block.size]
                    if block.passing and digest is None:
                        pass
                    elif block.within(span):
                        _cut_out(memoryview(kept)[block.offset - span.offset :], block, view)
                    else:
                        read_block(file.fileno(), view, block, path)
                    if digest is not None and block.hashed:
                        digest.update(view)
                    span = block if block.held else span
                    filled.put((block, buffer))
            filled.put(None)
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            filled.put(error)

    thread = threading.Thread(target=read, name=f"read {path.name}", daemon=True)
    thread.start()
    buffer = None
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            block, buffer = item
            yield block, memoryview(buffer)[: 0 if block.held or block.passing else block.size]
            free.put(buffer)
    finally:
        ended.set()
        free.put(buffer or mmap.mmap(-1, 1))
        thread.join()


def read_block(fd: int, view: memoryview, block: Block, path: Path) -> None:
    """Fill `view` with the bytes of a block of the open file. Raises what `read_exactly` raises."""
    for run in range(block.runs):
        part = view[run * block.nbytes : (run + 1) * block.nbytes]
        read_exactly(fd, part, block.offset + run * block.stride, path)


def _cut_out(data: memoryview, block: Block, view: memoryview) -> None:
    """Fill `view` with the bytes of a block that begins where `data` does."""
    runs = np.ndarray((block.runs, block.nbytes), np.uint8, data, strides=(block.stride, 1))
    np.frombuffer(view, np.uint8).reshape(runs.shape)[:] = runs


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from byte `offset` of the open file. Raises `UnreadableError` or `SourceChangedError`."""
    done = 0
    with reading(path):
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                raise SourceChangedError(f"{path}: ends at byte {offset + done:,}; it became shorter while being read")
            done += count


def tensor_bytes(folder: Path, tensor: TensorSpec, start: int = 0, end: int | None = None) -> bytearray:
    """Read a tensor of the checkpoint in `folder`, or its bytes from `start` up to `end`.

    Raises what `inside` and `read_exactly` raise.
    """
    return bytes_of(inside(folder, tensor.shard), tensor, start, end)


def bytes_of(path: Path, tensor: TensorSpec, start: int = 0, end: int | None = None) -> bytearray:
    """Read a tensor of the file at `path`, or its bytes from `start` up to `end`. Raises what `read_exactly` raises."""
    data = bytearray((tensor.nbytes if end is None else end) - start)
    with reading(path), open_file(path) as file:
        read_exactly(file.fileno(), memoryview(data), tensor.offset + start, path)
    return data


def file_sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """Compute the SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with reading(path), open_file(path) as file:
        buffer = memoryview(bytearray(BLOCK_BYTES))
        while count := file.readinto(buffer):
            if stopped():
                raise Stopped
            digest.update(buffer[:count])
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """The SHA-256 of a large file in the Hub's cache, which is the name of what it links to; "" for any other file."""
    target = real(path)
    blob = path.is_symlink() and target.parent.name == "blobs" and path.parent.parent.name == "snapshots"
    return target.name if blob and _SHA256.fullmatch(target.name) else ""


def is_whole(path: Path, size: int, sha256: str, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Whether `path` is a file, and no link, of `size` bytes with this SHA-256. Raises `Stopped`."""
    try:
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_size == size and file_sha256(path, stopped) == sha256
    except (OSError, UnreadableError):
        return False
