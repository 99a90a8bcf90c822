"""Files that others wrote, read within bounds: the kind of file, its bytes, the number and the depth of its values.

Every file that a user or a checkpoint can name is opened by `open_file`, and every JSON text parsed by `parse_json`.
What a file holds is then checked by one schema per kind of file, a frozen dataclass, with `convert`. `UnfitError` gives
the reason alone; callers say which file it is, and what to do, with an error of their own.
"""

import io
import json
import os
import re
import reprlib
import stat
import sys
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from w8a8.errors import UnreadableError

MAX_JSON_BYTES = 16_000_000
MAX_JSON_VALUES = 1_000_000
MAX_JSON_DEPTH = 100
"""Real configs nest five levels; Python's own limit would be met by whatever walks the config later."""

MAX_JSON_MEMORY = 100_000_000
"""Bytes that a text may take once decoded: one for each byte, or four if it holds a character beyond ASCII."""

MAX_TEXT_BYTES = 32_000_000
"""Some eight million tokens: many times what a calibration or an evaluation reads."""

_POINTER = re.compile(rb"version https://(git-lfs|hawser)\.github\.com/spec/")
_POINTER_BYTES = 1024
"""A pointer is shorter than this, by git-lfs's specification."""

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 200
_shown.maxlist = 12
show = _shown.repr
"""`repr`, but short and shallow: a file may hold megabytes where a name or a number should be."""

Count = Annotated[int, Meta(ge=0, lt=2**53)]
Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A finite number; NaN and the infinities are none."""

T = TypeVar("T")


def brief(value: Any) -> str:
    """`str`, but short, and on one line."""
    return show(str(value))[1:-1]


class UnfitError(ValueError):
    """A file is not what it should be. The message is the reason alone."""


class NoFileError(UnfitError):
    """What lies there is a directory, a pipe, a device or a socket."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` or `UnfitError` from reading `path`, or a file in it, into `UnreadableError`."""
    try:
        yield
    except (OSError, UnfitError) as error:
        raise _unreadable(path, error) from error


def real(path: str | Path) -> Path:
    """Return where `path` leads behind all links. One to itself stays; `Path.resolve` raises there in Python 3.11."""
    return Path(os.path.realpath(path))


def open_file(path: Path) -> io.FileIO:
    """Open a regular file for reading, unbuffered, without waiting for anyone.

    Raises `OSError`; `NoFileError`; `UnfitError` for git-lfs's pointer to a file.
    """
    return io.FileIO(path, "rb", opener=_open_regular)


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes. Raises `UnreadableError`, and `UnfitError` for a larger one, or none."""
    try:
        with io.BufferedReader(open_file(path)) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise UnfitError(f"larger than {limit:,} bytes")
            data = file.read(size + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > size:
        raise UnfitError("it grew while it was read")
    return data


def read_json(path: Path, kind: type[T], *, limit: int = MAX_JSON_BYTES) -> T:
    """Read a file that holds a JSON object as a `kind`: a dataclass, or `dict[str, Any]` for one of free form.

    Raises `UnreadableError`, and `UnfitError` where the file holds anything else.
    """
    value = parse_json(read_bytes(path, limit))
    if not isinstance(value, dict):
        raise UnfitError("not a JSON object")
    return convert(value, kind)


def parse_json(
    data: bytes,
    *,
    values: int = MAX_JSON_VALUES,
    pairs: Callable[[list[tuple[str, Any]]], dict[str, Any]] | None = None,
) -> Any:
    """Parse JSON in UTF-8, with or without a byte order mark, of at most `values` values; `pairs` makes the objects.

    NaN and infinities pass, as in Python and in published configs. Raises `UnfitError`.
    """
    wide = not data.isascii() or b"\\u" in data
    if len(data) * (4 if wide else 1) > MAX_JSON_MEMORY:
        raise UnfitError(f"{len(data):,} bytes of text are too many")
    # Each value but the first stands behind one of these, so no more can come out; in strings they count too.
    if sum(map(data.count, (b",", b":", b"[", b"{"))) > values:
        raise UnfitError(f"more than {values:,} values")
    try:
        value = json.loads(data.removeprefix(BOM_UTF8).decode(), object_pairs_hook=pairs)
        _check(value, MAX_JSON_DEPTH)
    except RecursionError as error:
        raise UnfitError("nested too deeply") from error
    except UnfitError:
        raise
    except ValueError as error:
        raise UnfitError(str(error)) from error
    return value


def convert(value: Any, kind: type[T]) -> T:
    """Return parsed JSON as a `kind`. Raises `UnfitError`, which names the first field that does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UnfitError(str(error)[:200]) from error


def _check(value: Any, depth: int) -> None:
    """Raise where values nest deeper than `depth`, or a text holds half a character, which JSON can spell."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, dict):
        for key, child in value.items():
            key.encode()
            _check(child, _deeper(depth))
    elif isinstance(value, list):
        for child in value:
            _check(child, _deeper(depth))


def _deeper(depth: int) -> int:
    if not depth:
        raise UnfitError("nested too deeply")
    return depth - 1


def _open_regular(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise NoFileError(f"{'a directory, ' if stat.S_ISDIR(status.st_mode) else ''}not a regular file")
        if status.st_size < _POINTER_BYTES and _POINTER.match(os.pread(fd, 64, 0)):
            raise UnfitError(
                "a git-lfs pointer, not the file itself; run `git lfs install` and `git lfs pull` in the clone, or "
                "download the repository with `hf download`"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _unreadable(path: Path, error: OSError | UnfitError) -> UnreadableError:
    if isinstance(error, UnfitError):
        return UnreadableError(f"{path}: cannot be read ({error})")
    return UnreadableError(f"{error.filename or path}: cannot be read ({error.strerror or error})")
