"""Prints notices, tables and results, or JSON.

Results go to standard output; notices about the work go to standard error, so that a pipe gets the results alone.
"""

import codecs
import io
import json
import os
import select
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from w8a8.errors import OutputClosedError, OutputError
from w8a8.terminal.events import event
from w8a8.terminal.wording import clean


def guard_streams() -> None:
    """Make standard output and error take any text, and fail with an error of ours or not at all; make input give any.

    A character that the encoding lacks is written as its number, `\\xe9`. What standard output cannot write raises
    `OutputError`; what standard error cannot is lost, and the work goes on. Standard input that is closed is empty, and
    what is no text in it becomes U+FFFD.
    """
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(os.devnull)), "utf-8")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sys.stdout = _guarded(sys.stdout, 1, _complain)
    sys.stderr = _guarded(sys.stderr, 2, lambda _: None)


def _guarded(stream: Any, fd: int, failed: Callable[[OSError], None]) -> IO[str]:
    if stream is None:  # closed: hold its place, so that no file takes it, by something that cannot be written
        os.dup2(os.open(os.devnull, os.O_RDONLY), fd)
        return io.TextIOWrapper(io.BufferedWriter(_Stream(fd, failed)), "utf-8", "w8a8")
    if not _leads_to(stream, fd):  # a notebook's, say
        return stream  # type: ignore[no-any-return]
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(fd, failed)),
        stream.encoding,
        "w8a8" if stream.errors in {"strict", "surrogateescape"} else stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _leads_to(stream: Any, fd: int) -> bool:
    try:
        return isinstance(stream, io.TextIOWrapper) and stream.fileno() == fd
    except (OSError, ValueError):
        return False


class _Stream(io.FileIO):
    """A standard stream, which `failed` is told of its first failure; what comes after that is dropped."""

    def __init__(self, fd: int, failed: Callable[[OSError], None]) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._failed = failed
        self._lost = False

    def write(self, data: Any) -> int:
        """Write some of `data`, and return how much."""
        while not self._lost:
            try:
                written = super().write(data)
            except OSError as error:
                self._lost = True
                self._failed(error)
                break
            if written is not None:
                return written
            select.select([], [self], [])  # another process made it one that does not wait
        return memoryview(data).nbytes


def _complain(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        raise OutputClosedError from error  # says nothing, as other programs in a pipe do
    raise OutputError(f"standard output cannot be written ({error.strerror})") from error


_PLAIN = {"•": "*", "…": "...", "–": "-", "—": "-", "’": "'", "“": '"', "”": '"'}


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell characters that an encoding lacks: their like in ASCII, or their number."""
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in missing), error.end


codecs.register_error("w8a8", _spell)


class Terminal:
    """Prints for a person, or JSON for a machine; `quiet` leaves out all but results and errors."""

    def __init__(self, *, json: bool = False, quiet: bool = False, log_json: bool = False) -> None:
        """`json` prints results as JSON; `quiet` drops notices, and `log_json` makes events of them."""
        self.json = json
        self.quiet = quiet
        self.log_json = log_json
        self.out = Console(highlight=False)
        self._err = Console(stderr=True, highlight=False)

    def notice(self, text: str) -> None:
        """Say something about the work under way."""
        if self.quiet:
            return
        if self.log_json:
            event("notice", text=text)
        else:
            self._err.print(clean(text), soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one paragraph of a result; `text` may hold Rich markup."""
        self.out.print(text, soft_wrap=True)

    def print(self, what: Any) -> None:
        """Print a part of a result, such as a table."""
        self.out.print(what)

    def print_json(self, value: Any) -> None:
        """Print a result for machines; dataclasses become objects."""
        print(json_text(value, indent=2))

    def table(self, result: Any, show: Callable[[Any, Callable[[Any], None]], None]) -> None:
        """Print a result that has a `to_dict`: as JSON, or by its own `show(result, print)`."""
        if self.json:
            self.print_json(result.to_dict())
        else:
            show(result, self.out.print)


def json_text(value: Any, indent: int | None = None) -> str:
    """Give `value` as JSON that standard output can take as it is, whatever its encoding."""
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")  # one in memory has none
    return json.dumps(value, indent=indent, ensure_ascii=not unicode, default=_plain)


def plain_table(*columns: str, left: int) -> Table:
    """Make a plain table whose first `left` columns are text, the others numbers; with none, the last one is text."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(columns):
        text = i < left or (i == len(columns) - 1 and left == 0)
        table.add_column(column, justify="left" if text else "right", overflow="fold" if text else "ellipsis")
    return table


def _plain(value: Any) -> Any:
    """Turn what `json` cannot print into what it can."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
