"""What a model is calibrated on: a text, cut into samples of equal length.

A text is a plain file, a JSONL file or a data set's train split; records are a `text`, a `question` and its `answer`,
or the `messages` of a chat. The latter two are put into the form of the model's chat template where it has one, because
that is what the model will read when it serves. All records are strung together, and the samples taken from all over
that string.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from w8a8.calibrate.request import BUILT_IN
from w8a8.errors import HubError, MissingExtraError, SourceNotFoundError, UsageError
from w8a8.texts.files import first_token, read, rows, strings

MAX_RECORDS = 20_000
"""Of a data set."""
MIN_SAMPLES = 2
"""One to choose by, one to judge by."""

Turn = dict[str, str]
Record = str | list[Turn]

_DATA_SET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Records, plain or chats, and the name they go by; `sha256` is the file's, or that of the records used."""

    name: str
    records: tuple[Record, ...]
    sha256: str


def load(given: str | None) -> CalibrationText:
    """The text `given`: a file, JSONL if its name ends so, or a data set `name[:config]`; by default the built-in one.

    Raises SourceNotFoundError, UnreadableError, UsageError that names the line, HubError, MissingExtraError.
    """
    if given is None:
        text = files("w8a8.texts").joinpath("samples.jsonl").read_text(encoding="utf-8")
        return _text(BUILT_IN, [_record(json.loads(line), BUILT_IN) for line in text.splitlines()], text)
    path = Path(given)
    if path.suffix in {".jsonl", ".json"}:
        return _text(path.name, [_record(row, where) for where, row in rows(path)], read(path))
    match = _DATA_SET.fullmatch(given)
    if match is None or path.exists() or path.suffix == ".txt":
        text = read(path)
        return _text(path.name, [text], text)
    found = [_record(row, f"{given}, record {number}") for number, row in enumerate(_data_set(**match.groupdict()), 1)]
    return _text(given, found, json.dumps(found, ensure_ascii=False))


def cut(text: CalibrationText, tokenizer: Any, *, samples: int, tokens: int) -> list[tuple[int, ...]]:
    """At most `samples` samples of `tokens` token ids each, spread over the whole text.

    A sample begins with the tokenizer's beginning-of-sequence token, where it has one. Raises UsageError where the text
    is too short for two.
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
    """The ids, beginning with `bos`, if there is one, at the cost of the last."""
    return tuple(ids) if bos is None or ids[0] == bos else (bos, *ids[:-1])


def _tokenize(record: Record, tokenizer: Any, bos: int | None) -> Iterator[int]:
    """A record's ids; a plain one begins as the tokenizer begins a text, a chat as its template does."""
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


def _text(name: str, records: Iterable[Record], whole: str) -> CalibrationText:
    return CalibrationText(name, tuple(records), hashlib.sha256(whole.encode()).hexdigest())


def _record(row: Any, where: str) -> Record:
    """What a record holds. Raises UsageError."""
    if text := strings(row, "text"):
        return text[0]
    if pair := strings(row, "question", "answer"):
        return [{"role": role, "content": said} for role, said in zip(("user", "assistant"), pair, strict=True)]
    turns = row.get("messages") if isinstance(row, dict) else None
    said = [strings(turn, "role", "content") for turn in turns] if isinstance(turns, list) else []
    if said and all(said):
        return [{"role": turn[0], "content": turn[1]} for turn in said if turn]
    raise UsageError(f"{where}: neither a text, nor a question and an answer, nor messages with role and content")


def _data_set(name: str, config: str | None) -> list[Any]:
    """The first records of a data set's train split."""
    if name.count("/") != 1:
        raise SourceNotFoundError(f"{name}: no such file, and not a data set on the Hub (org/name[:config])")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            f"{name}: no such file; a data set needs the datasets library: pip install 'w8a8[eval]'"
        ) from missing
    try:
        return list(islice(load_dataset(name, config, split="train", streaming=True), MAX_RECORDS))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise HubError(f"{name}: no such file, and the Hub could not deliver it as a data set: {said}") from error
