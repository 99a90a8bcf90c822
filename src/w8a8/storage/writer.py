"""Writing files: large ones once, front to back, hashed on the way; small ones whole or not at all.

The result must be on the disk before it is published, so the page cache would only be a detour: where the platform has
O_DIRECT, whole pages go straight from an aligned buffer to the disk, which costs a fraction of the processor time of
buffered writes and leaves the cache to the source. Elsewhere the same bytes are written the ordinary way.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from w8a8.checkpoint.stream import BLOCK_BYTES
from w8a8.errors import DiskFullError, UnwritableError

PAGE = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)


@contextmanager
def disk_errors(path: Path, *, resumable: bool = True) -> Iterator[None]:
    """Turn an `OSError` from writing `path` into `DiskFullError` or `UnwritableError`.

    `resumable` says that the same command goes on behind what is finished.
    """
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            kept = ". What is finished is kept" if resumable else ""
            raise DiskFullError(
                f"{path}: the disk is full{kept}; free some space and run the same command again"
            ) from error
        raise UnwritableError(f"{path}: cannot be written ({error.strerror})") from error


def write_whole(path: Path, data: bytes, *, resumable: bool = False) -> None:
    """Write a small file whole or not at all: what stood there stays until the new content is on the disk.

    A file keeps its mode. `resumable` is that of `disk_errors`. Raises `DiskFullError` or `UnwritableError`, and leaves
    no temporary file behind; one that a kill has left is used by the next write.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    with disk_errors(path, resumable=resumable):
        there = path.exists()
        if there and not path.is_file():  # a pipe or a device: nothing to replace it by
            with os.fdopen(_open_special(path), "wb") as special:
                special.write(data)
            return
        with _claimed(unfinished) as file:
            try:
                file.truncate(0)
                file.write(data)
                file.flush()
                if there:
                    os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
                os.fsync(file.fileno())
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise


def _open_special(path: Path) -> int:
    """Open a pipe or a device for writing: a pipe only where someone reads it, for opening would wait for that."""
    fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    os.set_blocking(fd, True)
    return fd


def _claimed(path: Path) -> IO[bytes]:
    """Open the file at `path` for this writer alone: another one of the same file waits."""
    while True:
        file = os.fdopen(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY | os.O_NOFOLLOW, 0o666), "ab")
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.lstat()):
                return file
        file.close()  # the other writer has finished it, and it is no temporary file any more


def write_json(path: Path, value: Any, *, indent: int | None = 2, resumable: bool = False) -> None:
    """Write `value` as JSON in UTF-8, with a newline at its end; see `write_whole`."""
    # Half a character, which UTF-8 cannot hold, is spelled as JSON spells it, which is as Python does.
    text = (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode(errors="backslashreplace")
    write_whole(path, text, resumable=resumable)


def write_stub(path: Path, pieces: Iterable[tuple[int, bytes]], size: int) -> None:
    """Put a file of `size` bytes at `path`, whole or not at all, that has `pieces`, each behind its offset, and holes.

    A hole takes no room. Raises `DiskFullError` or `UnwritableError`.
    """
    stub = path.with_name(f".{path.name}.stub")
    with disk_errors(stub):
        with stub.open("wb") as file:
            for offset, content in pieces:
                file.seek(offset)
                file.write(content)
            file.truncate(size)
        stub.replace(path)


class SequentialWriter:
    """Append to a new file at `path`. After `finish`, `sha256` and `size` describe what is on the disk.

    One buffer is written, by a thread of its own, while the other is filled: the disk and the processor work at once.
    """

    def __init__(self, path: Path, largest: int = BLOCK_BYTES) -> None:
        """`largest` is the most that `reserve` will be asked for."""
        self._path = path
        size = -(-(2 * BLOCK_BYTES + largest) // PAGE) * PAGE
        self._filling, self._other = (memoryview(mmap.mmap(-1, size)) for _ in range(2))
        self._filled = 0
        self._written = 0
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        with disk_errors(path):
            self._fd = _open_direct(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._thread.shutdown()
        os.close(self._fd)

    @property
    def size(self) -> int:
        """Bytes appended so far."""
        return self._written + self._filled

    @property
    def sha256(self) -> str:
        """SHA-256 of what was flushed, in hex; of the whole file after `finish`."""
        return self._digest.hexdigest()

    def reserve(self, nbytes: int) -> memoryview:
        """Append `nbytes` bytes, to be filled in by the caller before the next call.

        Raises `DiskFullError` or `UnwritableError` for what was appended before.
        """
        if self._filled + nbytes > len(self._filling) or self._filled >= 2 * BLOCK_BYTES:
            self._flush()
        view = self._filling[self._filled : self._filled + nbytes]
        self._filled += nbytes
        return view

    def append(self, data: bytes | memoryview) -> None:
        """Append `data`, of any length."""
        for start in range(0, len(data), BLOCK_BYTES):
            part = data[start : start + BLOCK_BYTES]
            self.reserve(len(part))[:] = part

    def finish(self) -> None:
        """Write what is left, cut the file to its true length and sync it."""
        self._flush()
        size, rest = self.size, self._filled
        if rest:
            self._digest.update(self._filling[:rest])
            self._start(-(-rest // PAGE) * PAGE)
        self._wait()
        with disk_errors(self._path):
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        self._written, self._filled = size, 0

    def _flush(self) -> None:
        """Have all whole pages written; what is left of the last one moves to the front of the other buffer."""
        whole = self._filled // PAGE * PAGE
        if not whole:
            return
        self._digest.update(self._filling[:whole])
        self._start(whole)
        self._other[: self._filled - whole] = self._filling[whole : self._filled]
        self._filling, self._other = self._other, self._filling
        self._written += whole
        self._filled -= whole

    def _start(self, nbytes: int) -> None:
        """Have the first bytes of the buffer written, once the other buffer is."""
        self._wait()
        self._writing = self._thread.submit(self._write, self._filling[:nbytes], self._written)

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        with disk_errors(self._path):
            while done < len(data):
                done += self._write_some(data[done:], offset + done)

    def _write_some(self, view: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._fd, view, offset)
        except OSError as error:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _O_DIRECT:
                raise
            # The file system took the flag but wants another alignment, or wrote part of a page before.
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_O_DIRECT)
            return os.pwrite(self._fd, view, offset)


def _open_direct(path: Path) -> int:
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | _O_DIRECT, 0o666)
    except OSError as error:
        if not _O_DIRECT or error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
