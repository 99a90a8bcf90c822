"""Folders: locking one for a run, and making its entries durable."""

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from w8a8.errors import TargetBusyError, UnwritableError
from w8a8.storage.writer import disk_errors


def acquire(home: Path, out: Path) -> int:
    """Make and lock the folder `home`; the lock lasts until the returned descriptor is closed.

    Raises `TargetBusyError`, `DiskFullError` or `UnwritableError`: for a link too, since what it leads to is not ours.
    """
    with disk_errors(home):
        if home.is_symlink() or (home.exists() and not home.is_dir()):
            kind = "a link" if home.is_symlink() else "not a folder"
            raise UnwritableError(f"{home}: is {kind}, where unfinished work on {out} lies; remove it, and start again")
        home.mkdir(parents=True, exist_ok=True)
        # It is gone, or another by now, where a run has just ended and removed it.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), home.lstat()):
                    return os.dup(lock)  # shares the lock
            finally:
                os.close(lock)
    raise TargetBusyError(f"{out}: another run is writing it now; wait for it, or stop it first")


def is_locked(home: Path) -> bool:
    """Whether a run holds the lock of the folder `home`; False where there is none."""
    try:
        folder = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(folder)
    return False


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


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, if it is there; of a link, the link alone. Raises `OSError`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def taken(path: Path) -> int:
    """The bytes that a file takes on the disk, which for a sparse one are few; 0 where it is gone."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def keep_only(folder: Path, files: Collection[str]) -> None:
    """Make `folder` if need be, and remove all that lies in it but its `files`. Raises `OSError`."""
    if folder.is_symlink() or not folder.is_dir():
        remove(folder)
        folder.mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.name not in files or entry.is_symlink() or not entry.is_file():
            remove(entry)
