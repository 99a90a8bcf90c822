"""The samples that a model is calibrated on, all of one length, cut from a text.

A text is a plain file, a JSONL file or a data set's train split. A record is a `text`, a `question` with its `answer`,
or the `messages` of a chat. Questions and chats take the form of the model's chat template, if it has one, because the
model reads that form when it serves. The records are joined, and the samples spread evenly over the whole.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from w8a8.errors import SourceNotFoundError, UsageError
from w8a8.reading import reading
from w8a8.texts import datasets
from w8a8.texts.files import first_token, read, rows, strings

BUILT_IN = "built-in text"
"""The name of the text that is used if none is given."""
MAX_RECORDS = 20_000
"""The most records that are read from a data set."""
MIN_SAMPLES = 2
"""At least one to choose scales with, and one to judge them with."""

Turn = dict[str, str]
Record = str | list[Turn]

_DATA_SET = re.compile(r"(?P<name>(?P<org>[\w.-]+/)?[\w.-]+)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Named records, plain or chats; `sha256` is the file's, or that of the records read from a data set."""

    name: str
    records: tuple[Record, ...]
    sha256: str


def load(given: str | None) -> CalibrationText:
    """Load the text `given`: a file, or a data set `org/name[:config]`; None is the built-in text.

    A file whose name ends in .jsonl or .json is read as JSONL, any other as plain text. Raises SourceNotFoundError,
    UnreadableError, UsageError naming the line, HubError, MissingExtraError.
    """
    if given is None:
        content = files("w8a8.texts").joinpath("samples.jsonl").read_text(encoding="utf-8")
        return _from_jsonl(BUILT_IN, content, BUILT_IN)
    path = Path(given)
    if path.suffix in {".jsonl", ".json"}:
        return _from_jsonl(path.name, read(path), str(path))
    match = _DATA_SET.fullmatch(given)
    if match is None or path.suffix == ".txt" or _is_there(path):
        text = read(path)
        return _text(path.name, [text], text)
    if match["org"] is None:
        raise SourceNotFoundError(f"{given}: no such file, and not a data set on the Hub (org/name[:config])")
    loaded = datasets.load(
        match["name"], match["config"], "train", limit=MAX_RECORDS, otherwise="there is no file of this name either"
    )
    found = [_record(row, f"{given}, record {number}") for number, row in enumerate(loaded, 1)]
    return _text(given, found, json.dumps(found, ensure_ascii=False))


def _is_there(path: Path) -> bool:
    with reading(path):
        return path.exists()


def cut(text: CalibrationText, tokenizer: Any, *, samples: int, tokens: int) -> list[tuple[int, ...]]:
    """Cut at most `samples` samples of `tokens` token ids each, spread evenly over the whole text.

    A sample begins with the beginning-of-sequence token, if the tokenizer begins texts with it. Raises UsageError if
    the text is too short for two samples.
    """
    bos = first_token(tokenizer)
    ids = [token for record in text.records for token in _tokenize(record, tokenizer, bos)]
    count = min(samples, len(ids) // tokens)
    if count < MIN_SAMPLES:
        raise UsageError(
            f"{text.name}: {len(ids):,} tokens are too few for {MIN_SAMPLES} samples of {tokens}; "
            "give a longer text, or fewer --tokens"
        )
    starts = [number * (len(ids) - tokens) // (count - 1) for number in range(count)]
    return [_sample(ids[start : start + tokens], bos) for start in starts]


def _sample(ids: Sequence[int], bos: int | None) -> tuple[int, ...]:
    """The ids as a sample that begins with `bos`, if there is one; the last id makes room for it."""
    return tuple(ids) if bos is None or ids[0] == bos else (bos, *ids[:-1])


def _tokenize(record: Record, tokenizer: Any, bos: int | None) -> Iterator[int]:
    """Yield a record's ids; a plain one begins as the tokenizer begins a text, a chat as the template does."""
    if isinstance(record, str):
        if bos is not None:
            yield bos
    elif tokenizer.chat_template:
        record = _templated(record, tokenizer)
    else:
        record = "\n".join(turn["content"] for turn in record)
    yield from tokenizer(record, add_special_tokens=False, verbose=False)["input_ids"]


def _templated(turns: list[Turn], tokenizer: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        said = [turn["role"] for turn in turns]
        raise UsageError(f"the model's chat template does not take a chat of {', '.join(said)}: {error}") from error


def _from_jsonl(name: str, content: str, source: str) -> CalibrationText:
    return _text(name, [_record(row, place) for place, row in rows(content, source)], content)


def _text(name: str, records: Iterable[Record], whole: str) -> CalibrationText:
    return CalibrationText(name, tuple(records), hashlib.sha256(whole.encode()).hexdigest())


def _record(row: Any, place: str) -> Record:
    """Read a record: its text, or its turns of a chat. Raises UsageError."""
    if text := strings(row, "text"):
        return text[0]
    if pair := strings(row, "question", "answer"):
        return [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    turns = row.get("messages") if isinstance(row, dict) else None
    said = [strings(turn, "role", "content") for turn in turns] if isinstance(turns, list) else []
    if said and all(said):
        return [{"role": turn[0], "content": turn[1]} for turn in said if turn]
    raise UsageError(f"{place}: neither a text, nor a question and an answer, nor messages with role and content")
