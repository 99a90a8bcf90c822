"""Downloads one file from the Hub: whole, with the length and the hash that the Hub gives for it, or not at all.

Bytes are hashed while they arrive. They go into a file beside the target, `.NAME.part`, which a later call goes on
with; only when length and hash are right does it become the target. A server that fails, cuts the connection or asks to
wait is asked again for what is missing.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from w8a8.checkpoint.stream import BLOCK_BYTES, Stopped
from w8a8.errors import HubError
from w8a8.storage.folders import remove
from w8a8.storage.writer import disk_errors

if TYPE_CHECKING:
    from hashlib import _Hash

ATTEMPTS = 6
"""Times that a server is asked without giving a byte, and that a file may come with a wrong hash or length, before the
download is given up."""
CHUNK_BYTES = 1 << 20

BACKOFF_SECONDS = 1.0
"""The first wait before asking again; each further one is twice as long."""
LONGEST_WAIT_SECONDS = 300.0
"""The longest wait, whatever the server asks for."""
TIMEOUT_SECONDS = 20.0
"""How long a server may say nothing."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at a commit: its bytes, and the hash that the Hub gives for it.

    `sha256` is that of a large file; of a small one it is "", and `blob` is git's: the SHA-1 of a header and the bytes.
    """

    repo: str
    commit: str
    name: str
    size: int
    sha256: str = ""
    blob: str = ""

    @property
    def hash(self) -> str:
        """The hash that the Hub gives, in hex."""
        return self.sha256 or self.blob

    def digest(self) -> "_Hash":
        """A hash that has seen what comes before the file's bytes."""
        return hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


class _FailedError(Exception):
    """The server did not deliver, and may be asked again after `wait` seconds; with `over`, for all from the start."""

    def __init__(self, reason: str, wait: float = 0.0, *, over: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.over = wait, over


def download(
    file: RemoteFile,
    target: Path,
    *,
    advance: Callable[[int], None] = lambda _: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Fetch `file` to `target`; tell `advance` of bytes as they come, and end early once `stopped()` holds.

    Raises `HubError` where the Hub refuses, or fails too often; `DiskFullError`, `UnwritableError`; `Stopped`. Except
    for a wrong hash, what came is kept for the next call.
    """
    part = target.with_name(f".{target.name}.part")
    failed = wrong = 0
    digest, size = _begun(file, part, stopped)
    advance(size)
    while True:
        before = size
        try:
            if size < file.size:
                for chunk in _body(file, size):
                    if stopped():
                        raise Stopped
                    size += len(chunk)
                    if size > file.size:
                        raise _FailedError(f"{file.size:,} bytes were expected, and more came", over=True)
                    with disk_errors(part), part.open("ab") as out:
                        out.write(chunk)
                    digest.update(chunk)
                    advance(len(chunk))
            if size < file.size:
                raise _FailedError(f"the connection ended at byte {size:,} of {file.size:,}")
            if digest.hexdigest() != file.hash:
                raise _FailedError("its hash is not the one that the Hub gives for it", over=True)
        except _FailedError as failure:
            failed, wrong = (failed + 1 if size <= before else 1), wrong + failure.over
            if failed >= ATTEMPTS or wrong >= ATTEMPTS // 2:
                if failure.over:
                    part.unlink(missing_ok=True)
                raise HubError(_given_up(file, str(failure), kept=not failure.over)) from failure
            if failure.over:
                advance(-min(size, file.size))
                part.unlink(missing_ok=True)
                digest, size = file.digest(), 0
            _wait(max(failure.wait, BACKOFF_SECONDS * 2 ** (failed - 1)), stopped)
        else:
            with disk_errors(target):
                part.touch()  # an empty file has no part
                part.replace(target)
            return


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


def _body(file: RemoteFile, begin: int) -> Iterator[bytes]:
    """The bytes of `file` from `begin` on. Raises `HubError` or `_FailedError`."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    url = hf_hub_url(file.repo, file.name, revision=file.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    try:
        with get_session().stream(
            "GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS
        ) as response:
            _check(file, response, begin)
            yield from response.iter_raw(CHUNK_BYTES)
    except (HTTPError, OSError) as error:
        raise _FailedError(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _check(file: RemoteFile, response: Any, begin: int) -> None:
    """Raise unless the response is what was asked for."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    from w8a8.checkpoint.source import refused

    status = response.status_code
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or (begin and status == HTTPStatus.OK):
        raise _FailedError("the Hub does not go on in the middle of it", over=True)
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        raise _FailedError(f"the Hub answered {status}", _retry_after(response.headers.get("Retry-After", "")))
    if response.is_error:
        response.read()
        try:
            hf_raise_for_status(response)
        except HTTPError as error:
            raise refused(f"{file.repo}@{file.commit}, {file.name}", error) from error
    if begin:
        place = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", response.headers.get("Content-Range", ""))
        if place is None or int(place[1]) != begin:
            raise _FailedError("the Hub sent another part of it than was asked for", over=True)


def _retry_after(text: str) -> float:
    """Seconds that a server asks to wait, given as a number or as a date."""
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _wait(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + min(seconds, LONGEST_WAIT_SECONDS)
    while (left := end - time.monotonic()) > 0:
        if stopped():
            raise Stopped
        time.sleep(min(left, 0.2))


def _given_up(file: RemoteFile, reason: str, *, kept: bool) -> str:
    what = "what came is kept, and the same command goes on" if kept else "give the same command again to try once more"
    return f"{file.repo}@{file.commit}, {file.name}: the Hub did not deliver it ({reason}); {what}"
