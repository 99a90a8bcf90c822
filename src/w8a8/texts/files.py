"""Text that models are shown: plain files, and JSONL with a document a line."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import SourceNotFoundError, UnreadableError, UsageError


@dataclass(frozen=True, slots=True)
class Text:
    """Documents, and the name they go by."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the documents in UTF-8 with a NUL between them; of a plain file, that of its bytes."""
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "surrogatepass")).hexdigest()


def read(path: Path) -> str:
    """A file of UTF-8 text. Raises SourceNotFoundError, UnreadableError, UsageError."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from error


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a JSONL file, each with its place. Raises what `read` does, UsageError for a line not JSON."""
    for number, line in enumerate(read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where}: not JSON: {error}") from error


def strings(row: Any, *names: str) -> list[str] | None:
    """The strings that a record has under all of `names`, else nothing."""
    found = [value for name in names if isinstance(row, dict) and isinstance(value := row.get(name), str)]
    return found if len(found) == len(names) else None


def first_token(tokenizer: Any) -> int | None:
    """The beginning-of-sequence token, where the tokenizer puts one before a text."""
    ids: list[int] = tokenizer("")["input_ids"]
    return tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
