"""Downloads one file from the Hub or a store: whole, with the length and the hash that it has there, or not at all.

Bytes are hashed while they arrive. They go into a file beside the target, `.NAME.part`, which a later call goes on
with; only when length and hash are right does it become the target. A server that fails, cuts the connection or asks to
wait is asked again for what is missing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from w8a8.checkpoint.remote import BACKOFF_SECONDS, NotDeliveredError, Remote, RemoteFile, wait
from w8a8.checkpoint.stream import BLOCK_BYTES, Stopped
from w8a8.storage.folders import remove
from w8a8.storage.writer import disk_errors

if TYPE_CHECKING:
    from hashlib import _Hash

ATTEMPTS = 6
"""Times in a row that a server is asked and gives too little, before the download is given up; half as many that a file
may come with a wrong hash or length."""
LEAST_BYTES, LEAST_SHARE = 1 << 20, 100
"""Too little is less than this, and than a hundredth of the file, before a connection ends."""
LEAST_SECONDS = 900.0
"""As little in this time ends it: 1.2 kB/s for a large file. Were 64 files on their way at once on a line of 100 kB/s,
each would have more."""


def download(
    remote: Remote,
    file: RemoteFile,
    target: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Fetch `file` to `target`, by way of the file beside it that `part_of` gives; see `fetch`."""
    part = part_of(target)
    found = fetch(remote, file, part, advance=advance, stopped=stopped)
    with disk_errors(target):
        part.replace(target)
    return found


def part_of(target: Path) -> Path:
    """Where a file arrives that is to become `target`."""
    return target.with_name(f".{target.name}.part")


def fetch(
    remote: Remote,
    file: RemoteFile,
    part: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Bring `file` to `part`, front to back, behind what an earlier call has left there, and return its hash.

    `advance` is told of bytes once they are there, and of as many less where what came turns out to be wrong, before it
    is removed. Ends early once `stopped()` holds. Raises `HubError` or `StoreError` where it is refused, or not
    delivered too often; `DiskFullError`, `UnwritableError`; `Stopped`. Except for a wrong hash, what came is kept for
    the next call.
    """
    failed = wrong = 0
    least = max(1, min(LEAST_BYTES, file.size // LEAST_SHARE))
    digest, size = _begun(file, part, stopped)
    advance(size)
    while True:
        before, late = size, time.monotonic() + LEAST_SECONDS
        try:
            if size < file.size:
                for chunk in remote.body(file, size):
                    if stopped():
                        raise Stopped
                    if size + len(chunk) > file.size:
                        raise NotDeliveredError(f"{file.size:,} bytes were expected, and more came", over=True)
                    with disk_errors(part), part.open("ab") as out:
                        out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    advance(len(chunk))
                    if time.monotonic() > late:
                        if size - before < least:
                            raise NotDeliveredError(f"{size - before:,} bytes came in {LEAST_SECONDS:.0f} s")
                        failed, before, late = 0, size, time.monotonic() + LEAST_SECONDS
            if size < file.size:
                raise NotDeliveredError(f"the connection ended at byte {size:,} of {file.size:,}")
            if file.hash not in ("", digest.hexdigest()):
                raise NotDeliveredError(f"its hash is not the one that {remote.keeper} gives for it", over=True)
        except NotDeliveredError as failure:
            failed, wrong = (failed + 1 if size - before < least else 1), wrong + failure.over
            if failed >= ATTEMPTS or wrong >= ATTEMPTS // 2:
                if failure.over:
                    part.unlink(missing_ok=True)
                raise remote.error(_given_up(remote, file, str(failure), kept=not failure.over)) from failure
            if failure.over:
                advance(-size)
                part.unlink(missing_ok=True)
                digest, size = file.digest(), 0
            wait(max(failure.wait, BACKOFF_SECONDS * 2 ** (failed - 1)), stopped)
        else:
            with disk_errors(part):
                part.touch()  # of an empty file nothing came
            return digest.hexdigest()


def _begun(file: RemoteFile, part: Path, stopped: Callable[[], bool]) -> tuple["_Hash", int]:
    """What an earlier call has left: the hash of it, and its bytes. What is no file, or too long, is removed."""
    digest, size = file.digest(), 0
    if part.is_symlink() or (part.exists() and (not part.is_file() or part.stat().st_size > file.size)):
        with disk_errors(part):
            remove(part)
    if part.exists():
        with disk_errors(part), part.open("rb") as begun:
            while block := begun.read(BLOCK_BYTES):
                if stopped():
                    raise Stopped
                digest.update(block)
                size += len(block)
    return digest, size


def _given_up(remote: Remote, file: RemoteFile, reason: str, *, kept: bool) -> str:
    what = "what came is kept, and the same command goes on" if kept else "give the same command again to try once more"
    return f"{remote.where(file.name)}: {remote.keeper} did not deliver it ({reason}); {what}"
