"""What `w8a8 eval kld` reads: a text as documents, and documents as windows of tokens.

A plain file is one document; of a JSONL file or of GSM8K every line is one. No window holds more than one document, as
no request to a server does. A window is the tokenizer's beginning-of-sequence token and up to `context - 1` tokens of
the document behind it; where a tokenizer has no such token, the document's token before them stands in its place. So
every token is predicted once (but, without such a token, the first of a document), from what lies before it in its
window.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import UsageError
from w8a8.evals.gsm8k.questions import load
from w8a8.texts.files import Text, read, rows, strings

MIN_CONTEXT = 2


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids: all but the last are read, all but the first predicted."""

    ids: tuple[int, ...]
    document: int

    @property
    def scored(self) -> int:
        """How many tokens of it are predicted."""
        return len(self.ids) - 1


def choose(*, text: Path | None = None, jsonl: Path | None = None, data: Path | None = None) -> Text:
    """The text of a plain file, of a JSONL file, or of GSM8K's test split in the folder `data`, else from the Hub.

    Raises UsageError where more than one is given or a file does not hold what it should, UnreadableError,
    SourceNotFoundError, HubError, and MissingExtraError where `datasets` is needed and not installed.
    """
    given = [path for path in (text, jsonl, data) if path is not None]
    if len(given) > 1:
        raise UsageError("give one of --text, --jsonl and --data")
    if text is not None:
        return Text(text.name, (read(text),))
    if jsonl is not None:
        return Text(jsonl.name, tuple(_document(row, place) for place, row in rows(read(jsonl), str(jsonl))))
    return Text("GSM8K test", tuple(f"{each.text}\n{each.solution}" for each in load(data, shots=0).questions))


def cut(documents: Sequence[Sequence[int]], bos: int | None, context: int, tokens: int) -> list[Window]:
    """Windows of at most `context` ids that predict `tokens` tokens, or as many as there are, of tokenized documents.

    Raises UsageError where not one token could be predicted.
    """
    found: list[Window] = []
    for number, ids in enumerate(documents):
        whole = (*([] if bos is None else [bos]), *ids)
        for at in range(0, len(whole) - 1, context - 1):
            body = whole[at + 1 : at + min(context, tokens + 1)]
            found.append(Window((whole[at] if bos is None else bos, *body), number))
            tokens -= len(body)
            if not tokens:
                return found
    if not found:
        raise UsageError("the text has no token to predict; give a longer one")
    return found


def tokenize(text: Text, tokenizer: Callable[..., Any]) -> list[list[int]]:
    """The ids of every document, without special tokens that the tokenizer would add around it."""
    return [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in text.documents]


def _document(row: Any, place: str) -> str:
    """The text of a record: its `text`, or its `question` and `answer` on lines of their own."""
    values = strings(row, "text") or strings(row, "question", "answer")
    if values is None:
        raise UsageError(f"{place}: neither a text, nor a question and an answer")
    return "\n".join(values)
