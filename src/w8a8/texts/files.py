"""Text that models read: plain files, and JSONL with one record per line."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import SourceNotFoundError, UnreadableError, UsageError
from w8a8.reading import MAX_TEXT_BYTES, NoFileError, UnfitError, parse_json, read_bytes

_LINE = re.compile("(.*)\n?")


@dataclass(frozen=True, slots=True)
class Text:
    """Documents under one name."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """The hash of the documents in UTF-8 with a NUL between them; for a plain file, that of its bytes."""
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> str:
    """Read a file of UTF-8 text. Raises SourceNotFoundError, UnreadableError, UsageError."""
    try:
        return read_bytes(path, MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnreadableError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise SourceNotFoundError(f"{path}: no such file") from error
        raise
    except NoFileError as error:
        raise UnreadableError(f"{path}: cannot be read ({error}); give a file of text") from error
    except UnfitError as error:
        raise UsageError(f"{path}: {error}; give a file of text, of at most {MAX_TEXT_BYTES:,} bytes") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error


def rows(text: str, source: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of JSONL, each with its place (`SOURCE, line 3`); empty lines hold none. Raises UsageError."""
    for number, match in enumerate(_LINE.finditer(text), start=1):
        if line := match[1].strip():
            place = f"{source}, line {number}"
            try:
                yield place, parse_json(line.encode("utf-8", "surrogatepass"))
            except UnfitError as error:
                raise UsageError(f"{place}: not JSON: {error}") from error


def strings(row: Any, *names: str) -> list[str] | None:
    """The values of a record under `names`, if all of them are strings."""
    found = [value for name in names if isinstance(row, dict) and isinstance(value := row.get(name), str)]
    return found if len(found) == len(names) else None


def first_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, if the tokenizer begins a text with one."""
    ids: list[int] = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
