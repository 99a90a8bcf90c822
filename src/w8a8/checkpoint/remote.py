"""Opens a checkpoint on the Hub by its headers alone: a few hundred kB instead of the whole.

A safetensors header lies at the start of its file and says all that is needed, so HTTP range requests fetch the config,
the index and each shard's first bytes, and no more is read than was asked for, whatever the server sends. They are laid
out as a folder whose shards have their true length and nothing behind the header (a sparse file takes no room), and
that folder is opened like any other: the same checks hold, and the safetensors library has its word.
"""

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory

from w8a8.checkpoint.ggufs import is_gguf
from w8a8.checkpoint.header import MAX_HEADER_BYTES
from w8a8.checkpoint.reader import INDEX, MAX_INDEX_BYTES, Checkpoint, require_config, weight_files
from w8a8.checkpoint.source import cached, hub_id, look_up, refused
from w8a8.errors import HubError, W8A8Error
from w8a8.reading import MAX_JSON_BYTES, reading

FIRST_BYTES = 100_000
"""Enough for most headers (huggingface_hub fetches as many)."""

MAX_FILE_BYTES = 2**43
WORKERS = 8


def remote_id(source: str | Path) -> tuple[str, str | None] | None:
    """The repository and revision that `source` names, unless it is a folder or a file, or whole in the Hub's cache.

    Raises `SourceNotFoundError` where it is none of these.
    """
    path = Path(source)
    with reading(path):
        if path.exists():
            return None
    repo, revision = hub_id(source)
    return None if _cached(repo, revision) else (repo, revision)


def open_headers(source: str | Path) -> Checkpoint:
    """Open a folder or a GGUF file; or a Hub id `org/name[@revision]`, from the cache or by its headers.

    The `path` of a checkpoint from the Hub is its id: there may be no folder. Raises what `Checkpoint.open` and
    `resolve` raise.
    """
    path = Path(source)
    with reading(path):
        if path.is_dir() or (is_gguf(path) and path.is_file()):
            return Checkpoint.open(path)
    repo, revision = hub_id(source)
    found = _cached(repo, revision) or _open_remote(repo, revision)
    return replace(found, path=Path(repo))


def _cached(repo: str, revision: str | None) -> Checkpoint | None:
    """Open a repository in the cache; None where it is not there, or not whole."""
    folder = cached(repo, revision)
    try:
        return Checkpoint.open(folder) if folder else None
    except W8A8Error:
        return None


def _open_remote(repo: str, revision: str | None) -> Checkpoint:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    label = repo + (f"@{revision}" if revision else "")
    try:
        info = look_up(label, repo, revision)
        names = {file.rfilename for file in info.siblings or ()}
        with TemporaryDirectory(prefix="w8a8-headers-") as folder, called(label, folder):
            lay_out(HubFiles(repo, info.sha), names, Path(folder))
            return Checkpoint.open(folder)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError, RuntimeError) as error:
        raise refused(label, error) from error


class HubFiles:
    """The files of one commit, a few bytes at a time."""

    def __init__(self, repo: str, commit: str | None) -> None:
        self._repo, self._commit = repo, commit

    def start(self, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
        """Fetch at most `count` bytes of a file, from `begin` on; return them and its length."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            get_session,
            hf_raise_for_status,
        )

        url = hf_hub_url(self._repo, name, revision=self._commit)
        headers = {**build_hf_headers(), "Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
        content = bytearray()
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
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


@contextmanager
def called(label: str, folder: str | Path) -> Iterator[None]:
    """Let errors speak of `label`, not of `folder`."""
    try:
        yield
    except W8A8Error as error:
        raise type(error)(str(error).replace(str(folder), label)) from error


def lay_out(files: HubFiles, names: set[str], folder: Path) -> Sequence[str]:
    """Lay config, index and the shards' headers out in `folder`; return the names of the shards."""
    require_config(folder, names)
    for name, limit in (("config.json", MAX_JSON_BYTES), (INDEX, MAX_INDEX_BYTES)):
        if name not in names:
            continue
        content, length = files.start(name, limit)
        if len(content) < length:
            raise HubError(f"{folder}/{name}: {len(content):,} bytes came, of {length:,}")
        (folder / name).write_bytes(content)
    _, shards = weight_files(folder, {name for name in names if "/" not in name})
    if missing := sorted({*shards} - names):
        raise HubError(f"{folder}: the index names {missing[0]}, which the repository does not hold")
    _headers(files, shards, folder)
    return shards


def _headers(files: HubFiles, shards: Iterable[str], folder: Path) -> None:
    def shard(name: str) -> None:
        content, length = files.start(name, FIRST_BYTES)
        if len(content) >= 8:
            (header,) = struct.unpack("<Q", content[:8])
            if len(content) < 8 + header <= length and header <= MAX_HEADER_BYTES:
                content, length = files.start(name, 8 + header)
        with (folder / name).open("wb") as file:
            file.write(content)
            file.truncate(length)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(shard, shards))
