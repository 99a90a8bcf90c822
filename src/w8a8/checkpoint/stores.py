"""Folders in object stores, through fsspec: `s3://`, `gs://`, `az://`, and whatever else it has an implementation of.

A store keeps objects by keys, not files in folders, so of a listing only keys count that could be files of this folder.
It gives no hash of an object, but a tag that changes with it (an ETag, a generation): what is read has the tag before
and after, so an object that is replaced meanwhile is noticed. Where the store can, each range is asked for under that
condition, too.
"""

import hashlib
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from http import HTTPStatus
from itertools import islice
from typing import Any, ClassVar, Self

from w8a8.checkpoint.remote import MAX_FILE_BYTES, NotDeliveredError, RemoteFile, begun
from w8a8.checkpoint.source import needed, refuse_pickles
from w8a8.checkpoint.stream import Stopped
from w8a8.errors import (
    MissingExtraError,
    NoConfigError,
    SourceChangedError,
    SourceNotFoundError,
    StoreError,
    UsageError,
    W8A8Error,
    first_line,
)
from w8a8.reading import show

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
"""Protocol -> the extra that installs what reads it."""
MAX_ENTRIES = 10_000
"""The most that a checkpoint's folder in a store may hold; the largest published have some 300 files."""
MAX_DEPTH = 3
LISTING_SECONDS = 120.0
"""How long the listing of a folder may take, all pages of which come before they are counted: so many have some ten."""
RANGE_BYTES = 8 << 20
"""Bytes of a request, all of which are in memory."""
RANGE_SECONDS = 600.0
"""How long one may take: with 14 kB/s it comes."""
READERS = 4
"""Requests on their way for a file at once."""
POLL_SECONDS = 0.5

_TAGS = ("ETag", "generation", "etag", "sha", "xet_hash", "blob_id", "mtime", "last_modified", "modified", "created")
"""What implementations call what changes with an object."""
_REFUSALS = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}


@dataclass(frozen=True)
class Store:
    """A folder in a store: `url` as messages have it, the fsspec file system, and the folder's path in it."""

    url: str
    system: Any
    root: str

    @property
    def protocol(self) -> str:
        """What the address begins with."""
        return self.url.partition("://")[0]

    @property
    def name(self) -> str:
        """The folder's name, as that of a folder here."""
        return self.root.rpartition("/")[2]

    @classmethod
    def at(cls, url: str) -> Self:
        """Connect to nothing yet. Raises `UsageError`, `MissingExtraError`, `StoreError`."""
        from fsspec import filesystem

        protocol, _, path = url.partition("://")
        shown = re.sub(r"//[^/@]*:[^/@]*@", "//", url.rstrip("/"))
        if "::" in url or {"", ".", ".."} & {*path.strip("/").split("/")}:
            raise UsageError(f"{shown}: is not the address of a folder, as in s3://bucket/folder")
        if protocol in ("file", "local"):
            raise UsageError(f"{shown}: lies here; give its path, without {protocol}://")
        for chatty in ("gcsfs", "azure"):  # they print what they also raise
            logging.getLogger(chatty).setLevel(logging.CRITICAL)
        try:
            system = filesystem(protocol, use_listings_cache=False, skip_instance_cache=True)
            return cls(shown, system, system._strip_protocol(url).rstrip("/"))
        except ImportError as missing:
            extra = EXTRAS.get(protocol)
            how = f"pip install 'w8a8[{extra}]'" if extra else first_line(missing)
            raise MissingExtraError(f"{shown}: {protocol}:// needs a package that is not installed: {how}") from missing
        except ValueError as error:
            if "rotocol not known" not in str(error):
                raise StoreError(f"{shown}: {first_line(error)}") from error
            raise UsageError(f"{shown}: there is no {protocol}://; s3://, gs://, az:// and hf:// are known") from error

    def overlaps(self, other: "Store") -> bool:
        """Whether one of two folders is the other, or lies in it."""
        ours, theirs = f"{self.root}/", f"{other.root}/"
        return type(self.system) is type(other.system) and (ours.startswith(theirs) or theirs.startswith(ours))

    def where(self, name: str) -> str:
        """What messages call a file of the folder, or, with "", the folder."""
        return f"{self.url}/{name}" if name else self.url

    def path(self, name: str) -> str:
        """Where a file of the folder lies in the store."""
        return f"{self.root}/{name}"

    @contextmanager
    def asking(self, name: str = "") -> Iterator[None]:
        """Translate whatever an implementation raises: into `W8A8Error` where to ask again would not help.

        Else into `NotDeliveredError`; a `FileExistsError` is an answer, and stays one.
        """
        where = self.where(name)
        try:
            yield
        except (W8A8Error, NotDeliveredError, Stopped, FileExistsError):
            raise
        except FileNotFoundError as error:
            raise SourceNotFoundError(f"{where}: not found in the store") from error
        except Exception as error:  # each implementation has its own kinds
            if _status(error) == HTTPStatus.NOT_FOUND:
                raise SourceNotFoundError(f"{where}: not found in the store") from error
            if _is_refusal(error):
                raise StoreError(
                    f"{where}: the store refused: {first_line(error)[:200]}; check the credentials and their rights"
                ) from error
            raise NotDeliveredError(first_line(error)[:200]) from error

    @contextmanager
    def insisting(self, name: str = "") -> Iterator[None]:
        """Translate whatever an implementation raises into `W8A8Error`."""
        try:
            with self.asking(name):
                yield
        except NotDeliveredError as error:
            raise StoreError(f"{self.where(name)}: the store did not answer ({error}); try again") from error

    def info(self, name: str) -> RemoteFile:
        """Look a file up, as it is now. Raises what the implementation raises."""
        return _described(name, self.system.info(self.path(name)))

    def listing(self) -> Mapping[str, RemoteFile]:
        """List the files, also those in folders of it, by name. Raises what `asking` raises."""
        found: dict[str, RemoteFile] = {}
        seen, folders = 0, [(self.root, 0)]
        with self.asking():
            while folders:
                folder, depth = folders.pop()
                listed = begun(partial(self.system.ls, folder, detail=True))
                if not wait([listed], LISTING_SECONDS).done:
                    raise StoreError(f"{self.url}: its listing did not end in {LISTING_SECONDS:.0f} s; try again later")
                entries = listed.result()
                seen += len(entries)
                if seen > MAX_ENTRIES:
                    raise StoreError(f"{self.url}: holds more than {MAX_ENTRIES:,} objects; name the model's folder")
                for entry in entries:
                    path = str(entry["name"]).rstrip("/")
                    name = path.removeprefix(f"{self.root}/")
                    if name == path or not _is_file_name(name):
                        continue
                    if entry["type"] != "directory":
                        found[name] = _described(name, entry)
                    elif depth < MAX_DEPTH:
                        folders.append((path, depth + 1))
        return found


@dataclass(frozen=True)
class StoreFolder:
    """A checkpoint in a store, as it was listed."""

    store: Store
    files: Mapping[str, RemoteFile]
    keeper: ClassVar[str] = "the store"
    error: ClassVar[type[W8A8Error]] = StoreError
    revision: ClassVar[None] = None

    @classmethod
    def find(cls, url: str) -> Self:
        """List a checkpoint's folder.

        Raises `UsageError`, `MissingExtraError`, `StoreError`, `SourceNotFoundError`, `NoConfigError`,
        `PickleOnlyError`, `NoWeightsError`.
        """
        store = Store.at(url)
        with store.insisting():
            # Where there is no config.json nothing is listed, however much there is.
            if not store.system.exists(store.path("config.json")):
                if store.system.exists(store.root):
                    raise NoConfigError(f"{url}: no config.json here, so this is not a Hugging Face checkpoint")
                raise SourceNotFoundError(f"{url}: no such bucket, or no such folder in it")
            files = store.listing()
        refuse_pickles(url, files)
        return cls(store, files)

    @property
    def label(self) -> str:
        """The address."""
        return self.store.url

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.store.name

    @cached_property
    def version(self) -> str:
        """A hash of what is in it."""
        files = [(file.name, file.size, file.tag) for file in map(self.files.__getitem__, sorted(needed(self.files)))]
        return hashlib.sha256(repr(files).encode()).hexdigest()[:40]

    def where(self, name: str) -> str:
        """The address of a file."""
        return self.store.where(name)

    def start(self, name: str, count: int, begin: int = 0) -> tuple[bytes, int]:
        """Fetch at most `count` bytes of a file, from `begin` on; return them and its length.

        Raises `StoreError`, `SourceNotFoundError`, `SourceChangedError`, `NotDeliveredError`.
        """
        file = self.files[name]
        end = min(begin + count, file.size)
        with self.store.asking(name):
            content = self.store.system.cat_file(self.store.path(name), start=begin, end=end) if begin < end else b""
            self._check(file)
        return bytes(content[:count]), file.size

    def body(self, file: RemoteFile, begin: int) -> Iterator[bytes]:
        """Fetch `file` from byte `begin` on, if it still is what was listed.

        Raises `StoreError`, `SourceNotFoundError`, `SourceChangedError`, `NotDeliveredError`.
        """
        with self.store.asking(file.name):
            self._check(file, begin)
            path, read = self.store.path(file.name), partial(self.store.system.open, mode="rb", cache_type="none")
            yield from _ranges(partial(read, path), begin, file.size)
            self._check(file, file.size)

    def _check(self, file: RemoteFile, begin: int = 0) -> None:
        """Raise where the store has another file by now; with bytes of it `begin`ning already, fetch it anew first."""
        now = self.store.info(file.name)
        if (now.size, now.tag) != (file.size, file.tag):
            if begin:
                raise NotDeliveredError("it was replaced meanwhile", over=True)
            raise SourceChangedError(f"{self.where(file.name)}: was replaced meanwhile; run the same command again")


def _ranges(open_: Callable[[], Any], begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, in order, asked for in several ranges at once: each takes its time.

    Each reader has one on its way. While nothing comes, an empty piece does now and then, so that whoever takes them
    can stop; nobody waits for a reader then. Raises what an implementation raises, `EOFError`, `NotDeliveredError`.
    """

    def read(reader: Any, offset: int) -> bytes:
        reader.seek(offset)
        content = bytes(reader.read(min(RANGE_BYTES, end - offset)))
        if len(content) != min(RANGE_BYTES, end - offset):
            raise EOFError(f"{len(content):,} bytes came at byte {offset:,}, where {end - offset:,} are left")
        return content

    offsets = iter(range(begin, end, RANGE_BYTES))
    first = [*islice(offsets, READERS)]
    readers = [open_() for _ in first]
    coming = deque(
        (reader, begun(partial(read, reader, offset))) for reader, offset in zip(readers, first, strict=True)
    )
    while coming:
        reader, future = coming.popleft()
        late = time.monotonic() + RANGE_SECONDS
        while not wait([future], POLL_SECONDS).done:
            if time.monotonic() > late:
                raise NotDeliveredError(f"{RANGE_BYTES:,} bytes did not come within {RANGE_SECONDS:.0f} s")
            yield b""
        yield future.result()
        coming.extend((reader, begun(partial(read, reader, offset))) for offset in islice(offsets, 1))


def _is_file_name(name: str) -> bool:
    """Whether an object's name could be that of a file in this folder, and nowhere else."""
    return not {"", ".", ".."} & {*name.split("/")} and "\\" not in name and "\0" not in name


def _described(name: str, info: Mapping[str, Any]) -> RemoteFile:
    size, tags = info.get("size"), [_spelled(info[key]) for key in _TAGS if info.get(key) is not None]
    if not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
        raise StoreError(f"{show(name)}: the store does not say how long it is")
    return RemoteFile(name, size, tag=tags[0] if tags else "")


def _spelled(tag: Any) -> str:
    """A tag as text; of a time, which some listings have as a number, the seconds."""
    tag = tag.timestamp() if isinstance(tag, datetime) else tag
    return f"{tag:.6f}" if isinstance(tag, float) else str(tag)


def _status(error: Exception) -> Any:
    """The status that a server answered, as far as the error has it."""
    return getattr(error, "status_code", getattr(error, "code", None))


def _is_refusal(error: Exception) -> bool:
    """Whether it is about who asks."""
    kind = type(error).__name__
    return (
        isinstance(error, PermissionError)
        or _status(error) in _REFUSALS
        or "Credential" in kind
        or "Authentication" in kind
        or str(error).startswith("Forbidden")
    )
