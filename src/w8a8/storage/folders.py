"""Folders: locking one for a run, and making its entries durable."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from w8a8.errors import TargetBusyError
from w8a8.storage.writer import disk_errors


def acquire(home: Path, out: Path) -> int:
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
    lock = acquire(home, out)
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
