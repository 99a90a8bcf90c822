"""The text that `w8a8 eval kld` reads: documents, cut into windows of tokens.

A plain file is one document; in a JSONL file, and in GSM8K, each record is one. A window never holds more than one
document, as no request to a server does. It is the tokenizer's beginning-of-sequence token and up to `context - 1`
tokens of the document; without such a token it begins with the token before them. So every token is predicted once,
from the tokens before it in its window (all but a document's first, if there is no beginning-of-sequence token).
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
    """Token ids: the model reads all but the last, and predicts all but the first."""

    ids: tuple[int, ...]
    document: int

    @property
    def scored(self) -> int:
        """Number of tokens that are predicted."""
        return len(self.ids) - 1


def choose(*, text: Path | None = None, jsonl: Path | None = None, data: Path | None = None) -> Text:
    """Read a plain file, a JSONL file, or GSM8K's test split from the folder `data` (default: from the Hub).

    Raises UsageError if more than one is given or a file has invalid content, UnreadableError, SourceNotFoundError,
    HubError, and MissingExtraError if `datasets` is needed and not installed.
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
    """Cut tokenized documents into windows of at most `context` ids, which predict at most `tokens` tokens together.

    Raises UsageError if there is no token to predict.
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
    """The ids of every document, without the special tokens that the tokenizer would add around it."""
    return [tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] for document in text.documents]


def _document(row: Any, place: str) -> str:
    """The text of a record: its `text`, or its `question` and `answer`, each on a new line."""
    values = strings(row, "text") or strings(row, "question", "answer")
    if values is None:
        raise UsageError(f"{place}: neither a text, nor a question and an answer")
    return "\n".join(values)
