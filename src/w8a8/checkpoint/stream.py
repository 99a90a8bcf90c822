"""Reads a file once, front to back: a thread of its own reads and hashes, the caller works on the blocks it hands over.

SHA-256 must see a file's bytes in order, and is the slowest thing the quantizer does to a byte (`w8a8 bench quantize`
has it as a row). So it gets a core to itself, on bytes that are still in cache from reading, and everything
else (amax, codes, hashing the output, writing) happens on the other side of the queue. Memory is the buffers: four
per file.
"""

import hashlib
import mmap
import os
import queue
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from w8a8.checkpoint import Shard, TensorSpec
from w8a8.checkpoint.reader import inside
from w8a8.errors import SourceChangedError, UnreadableError
from w8a8.reading import open_file, reading

if TYPE_CHECKING:
    from hashlib import _Hash

BLOCK_BYTES = 4 << 20
"""Bytes per read: large enough for any disk, small enough to stay in a core's share of the cache."""

BUFFERS = 4


class Stopped(Exception):  # noqa: N818 - a signal between threads, never shown
    """Another shard failed, or the user interrupted; this one ends early."""


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
    """`nbytes` bytes from byte `offset` of a file: rows from `row` on of `tensor`, or no tensor's (the header)."""

    tensor: TensorSpec | None
    row: int
    offset: int
    nbytes: int


def row_bytes(tensor: TensorSpec) -> int:
    """Count the bytes of one row of a matrix, or of one element of any other tensor."""
    count = tensor.shape[0] if len(tensor.shape) == 2 else tensor.numel
    return tensor.nbytes // max(count, 1)


def tensor_blocks(tensor: TensorSpec) -> Iterator[Block]:
    """Cut a tensor into blocks of whole rows, each at most `BLOCK_BYTES` unless a single row is longer."""
    if tensor.nbytes == 0:
        return
    width = row_bytes(tensor)
    rows = max(1, BLOCK_BYTES // width)
    for first in range(0, tensor.nbytes // width, rows):
        nbytes = min(rows * width, tensor.nbytes - first * width)
        yield Block(tensor, first, tensor.offset + first * width, nbytes)


def shard_blocks(shard: Shard) -> Iterator[Block]:
    """Cut a whole shard into blocks, first byte to last: its header, then its tensors, which tile the rest."""
    data_start = shard.tensors[0].offset if shard.tensors else shard.size
    for offset in range(0, data_start, BLOCK_BYTES):
        yield Block(None, 0, offset, min(BLOCK_BYTES, data_start - offset))
    for tensor in shard.tensors:
        yield from tensor_blocks(tensor)


def stream(
    path: Path, blocks: Iterable[Block], stopped: Callable[[], bool] = lambda: False, digest: "_Hash | None" = None
) -> Generator[tuple[Block, memoryview], None, None]:
    """Yield each block with its bytes, which are valid until the next one is asked for.

    Close the generator (`contextlib.closing`) to end its thread early. `digest` is updated with every byte.
    Raises `UnreadableError`, `SourceChangedError` (the file became shorter), `Stopped` (once `stopped()` holds).
    """
    blocks = list(blocks)
    size = max((block.nbytes for block in blocks), default=1)
    free: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
    filled: queue.SimpleQueue[tuple[Block, mmap.mmap] | BaseException | None] = queue.SimpleQueue()
    for _ in range(min(BUFFERS, len(blocks))):
        free.put(mmap.mmap(-1, size))
    ended = threading.Event()

    def read() -> None:
        try:
            with reading(path), open_file(path) as file:
                for block in blocks:
                    buffer = free.get()
                    if stopped() or ended.is_set():
                        raise Stopped
                    view = memoryview(buffer)[: block.nbytes]
                    read_exactly(file.fileno(), view, block.offset, path)
                    if digest is not None:
                        digest.update(view)
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
            yield block, memoryview(buffer)[: block.nbytes]
            free.put(buffer)
    finally:
        ended.set()
        free.put(buffer or mmap.mmap(-1, 1))
        thread.join()


def read_exactly(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` from byte `offset` of the open file. Raises `UnreadableError` or `SourceChangedError`."""
    done = 0
    while done < len(view):
        with reading(path):
            count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise SourceChangedError(f"{path}: ends at byte {offset + done:,}; it became shorter while being read")
        done += count


def tensor_bytes(folder: Path, tensor: TensorSpec, start: int = 0, end: int | None = None) -> bytearray:
    """Read a tensor of the checkpoint in `folder`, or its bytes from `start` up to `end`.

    Raises what `inside` and `read_exactly` raise.
    """
    path = inside(folder, tensor.shard)
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


def is_whole(path: Path, size: int, sha256: str, stopped: Callable[[], bool] = lambda: False) -> bool:
    """Whether `path` is a file, and no link, of `size` bytes with this SHA-256. Raises `Stopped`."""
    try:
        status = path.lstat()
        return stat.S_ISREG(status.st_mode) and status.st_size == size and file_sha256(path, stopped) == sha256
    except (OSError, UnreadableError):
        return False
