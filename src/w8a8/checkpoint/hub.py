"""A model on the Hub as a folder far away: one commit, whose files are listed with their lengths and hashes."""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar, Self

from w8a8.checkpoint.remote import MAX_FILE_BYTES, NotDeliveredError, RemoteFile
from w8a8.checkpoint.session import bound, retry_after
from w8a8.checkpoint.source import look_up, refused, unreachable
from w8a8.errors import HubError, W8A8Error
from w8a8.reading import show

CHUNK_BYTES = 1 << 20
CHUNK_SECONDS = 0.5
"""How long pieces of a file are gathered, however few come, or none: whoever takes them looks then whether to stop."""
TIMEOUT_SECONDS = 20.0
"""How long a server may say nothing."""


@dataclass(frozen=True)
class HubFolder:
    """A model on the Hub at the commit `version`; `label` is what the user called it."""

    name: str
    label: str
    version: str
    files: Mapping[str, RemoteFile]
    keeper: ClassVar[str] = "the Hub"
    error: ClassVar[type[W8A8Error]] = HubError

    @classmethod
    def find(cls, repo: str, revision: str | None) -> Self:
        """Look a model up. Raises `HubError`, `SourceNotFoundError`, `PickleOnlyError`, `NoWeightsError`."""
        from huggingface_hub.errors import (  # type: ignore[attr-defined]
            HTTPError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        label = repo + (f"@{revision}" if revision else "")
        try:
            info = look_up(label, repo, revision, sizes=True)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise refused(label, error) from error
        except (HTTPError, OfflineModeIsEnabled) as error:
            raise unreachable(label, error) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise refused(label, error) from error
        if not re.fullmatch(r"[0-9a-f]{40}", commit := str(info.sha)):  # it becomes the name of a folder
            raise HubError(f"{label}: the Hub does not say which commit it is at ({show(commit)})")
        files = {sibling.rfilename: _listed(label, sibling) for sibling in info.siblings or ()}
        return cls(repo, label, commit, files)

    @property
    def revision(self) -> str:
        """The commit."""
        return self.version

    def where(self, name: str) -> str:
        """A file at the commit."""
        return f"{self.name}@{self.version}, {name}"

    def start(self, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
        """Fetch at most `count` bytes of a file, from `begin` on; return them and its length.

        Raises `HubError`, `SourceNotFoundError` or `NotDeliveredError`.
        """
        content = bytearray()
        headers = {"Range": f"bytes={begin}-{begin + count - 1}"}
        with self._translated(), self._get(name, headers) as response:
            self._answered(name, response)
            length = response.headers.get("Content-Range", "").rpartition("/")[2]
            length = length or response.headers.get("Content-Length", "")
            if not re.fullmatch(r"\d{1,13}", length) or int(length) > MAX_FILE_BYTES:
                raise ValueError(f"{name}: the server does not say how long it is ({length!r:.40})")
            skipped = begin if response.status_code == HTTPStatus.OK else 0  # it sends all, whatever it was asked for
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= skipped + count:
                    break
        return bytes(content[skipped : skipped + count]), int(length)

    def body(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """Fetch `file` from byte `begin` on. Raises `HubError`, `SourceNotFoundError` or `NotDeliveredError`."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        headers = {"Range": f"bytes={begin}-"} if begin else {}
        try:
            with self._get(file.name, headers) as response:
                self._check(file, response, begin)
                yield from _gathered(_pieces(response))
        except (HTTPError, OSError) as error:
            raise _not_delivered(error) from error

    def keep(self, name: str) -> None:
        """Put a small file into the Hub's cache for later; where the Hub does not give it, it is not there."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        if name in self.files:
            with suppress(HTTPError, OSError, ValueError):
                hf_hub_download(self.name, name, revision=self.version)

    def _get(self, name: str, headers: Mapping[str, str]) -> Any:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        bound()
        url = hf_hub_url(self.name, name, revision=self.version)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
        return get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=TIMEOUT_SECONDS)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

        try:
            yield
        except (OfflineModeIsEnabled, ValueError, RuntimeError) as error:
            raise refused(self.label, error) from error
        except (HTTPError, OSError) as error:
            raise _not_delivered(error) from error

    def _check(self, file: RemoteFile, response: Any, begin: int) -> None:
        """Raise unless the response is what was asked for."""
        status = response.status_code
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or (begin and status == HTTPStatus.OK):
            raise NotDeliveredError("the Hub does not go on in the middle of it", over=True)
        self._answered(file.name, response)
        if begin:
            place = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", response.headers.get("Content-Range", ""))
            if place is None or int(place[1]) != begin:
                raise NotDeliveredError("the Hub sent another part of it than was asked for", over=True)

    def _answered(self, name: str, response: Any) -> None:
        """Raise unless the Hub gives the file."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status = response.status_code
        if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
            raise NotDeliveredError(f"the Hub answered {status}", retry_after(response.headers.get("Retry-After", "")))
        try:
            hf_raise_for_status(response)
        except HTTPError as error:
            raise refused(self.where(name), error) from error


def _pieces(response: Any) -> Iterator[bytes]:
    """The bytes of a response, as they come.

    The HTTP library takes its time with each of the many small pieces that a connection gives: 16 KiB each with TLS. A
    body of a known length is all that follows its head in HTTP/1.1. So behind the first piece, with which the library
    gives all that it has read, the connection itself is read, and closed at the end.
    """
    pieces, connection = response.iter_raw(), response.extensions.get("network_stream")
    length, encoding = (response.headers.get(name, "") for name in ("Content-Length", "Transfer-Encoding"))
    if not connection or encoding or response.http_version != "HTTP/1.1" or not re.fullmatch(r"\d{1,15}", length):
        yield from pieces
        return
    left = int(length)
    piece = next(pieces, b"")
    while piece:
        yield piece
        left -= len(piece)
        if left <= 0:
            return
        piece, silent = b"", time.monotonic() + TIMEOUT_SECONDS
        while not piece:
            try:
                piece = connection.read(min(left, CHUNK_BYTES), timeout=CHUNK_SECONDS)
                break
            except Exception as error:  # of the library below the HTTP library, whose names for them may change
                if not isinstance(error.__cause__ or error.__context__, TimeoutError) or time.monotonic() > silent:
                    raise _not_delivered(error) from error
                yield b""


def _not_delivered(error: Exception) -> NotDeliveredError:
    return NotDeliveredError(" ".join(str(error).split())[:200] or type(error).__name__)


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Put pieces together, `CHUNK_BYTES` at a time: the HTTP library's own way copies them three times."""
    waiting: list[bytes] = []
    due = time.monotonic() + CHUNK_SECONDS
    try:
        for piece in pieces:
            waiting.append(piece)
            if sum(map(len, waiting)) >= CHUNK_BYTES or time.monotonic() >= due:
                yield b"".join(waiting)
                waiting.clear()
                due = time.monotonic() + CHUNK_SECONDS
    except Exception:
        yield b"".join(waiting)  # what came before the connection ended
        raise
    yield b"".join(waiting)


def _listed(label: str, sibling: Any) -> RemoteFile:
    size, large = sibling.size, sibling.lfs
    if not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
        raise HubError(f"{label}: the Hub does not say how long {show(sibling.rfilename)} is")
    return RemoteFile(sibling.rfilename, size, str(large.sha256) if large else "", str(sibling.blob_id or ""))
