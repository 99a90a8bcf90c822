"""GSM8K's questions, and how they are put to a model.

The dataset's answers end in `#### <number>`, which is the form an answer is asked for in. As examples they are shown as
they are, calculator annotations (`<<48/2=24>>`) included, which is what lm-evaluation-harness does too.

K. Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (MIT licence).
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import HubError, MissingExtraError, UsageError
from w8a8.evals.gsm8k.scoring import strict

DATASET = "openai/gsm8k"
ANSWER_FORMAT = "#### <answer>"
INSTRUCTION = f"Solve the problem step by step. Give the final answer alone on the last line, as: {ANSWER_FORMAT}"
STOP = ("Question:", "</s>", "<|im_end|>")
"""What ends a completion: a base model would go on with a question of its own."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the dataset's answer to it, which ends in `#### <number>`."""

    text: str
    solution: str

    @property
    def gold(self) -> str:
        """The right answer, plain: `1080`."""
        return str(strict(self.solution))


@dataclass(frozen=True, slots=True)
class Data:
    """The examples that are shown, in order, and the questions that are asked."""

    examples: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """Of the questions asked and their right answers."""
        return _sha256([[q.text, q.gold] for q in self.questions])


def load(folder: Path | None, *, shots: int, limit: int | None = None) -> Data:
    """The first `shots` training examples and the first `limit` test questions (all, if `None`).

    From `train.jsonl` and `test.jsonl` in `folder`, else from the Hub. Raises `UsageError` naming the file and line
    that is no question with an answer, `HubError`, or `MissingExtraError`.
    """
    parts = _from_folder(folder) if folder else _from_hub()
    train, test = (_questions(rows, place) for place, rows in parts)
    if not test:
        raise UsageError(f"{parts[1][0]}: no questions")
    if shots > len(train):
        raise UsageError(f"--shots {shots}: {parts[0][0]} has {len(train)} examples")
    return Data(tuple(train[:shots]), tuple(test[:limit]))


def request(question: str, examples: Sequence[Question], *, completions: bool) -> dict[str, Any]:
    """The part of an API request that holds the question: a chat, or a text to be completed and where to stop."""
    if completions:
        shown = [f"Question: {example.text}\nAnswer: {example.solution}" for example in examples]
        return {"prompt": "\n\n".join([*shown, f"Question: {question}\nAnswer:"]), "stop": list(STOP)}
    turns = [
        turn
        for example in examples
        for turn in (_turn("user", asked(example.text)), _turn("assistant", example.solution))
    ]
    return {"messages": [*turns, _turn("user", asked(question))]}


def asked(question: str) -> str:
    """The question as a turn of a chat."""
    return f"{question}\n\n{INSTRUCTION}"


def prompt_sha256(examples: Sequence[Question], *, completions: bool) -> str:
    """Of all that is sent but the question itself."""
    return _sha256(request("{question}", examples, completions=completions))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _from_folder(folder: Path) -> list[tuple[str, list[Any]]]:
    return [(str(path), _lines(path)) for path in (folder / "train.jsonl", folder / "test.jsonl")]


def _lines(path: Path) -> list[Any]:
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error}); --data names a folder with both files") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def _from_hub() -> list[tuple[str, Iterable[Any]]]:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as missing:
        raise MissingExtraError(
            "GSM8K comes with the datasets library: pip install 'w8a8[eval]', or give --data FOLDER"
        ) from missing
    try:
        parts = load_dataset(DATASET, "main")
        return [(f"{DATASET} {split}", parts[split]) for split in ("train", "test")]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = " ".join(str(error).split())[:300]
        raise HubError(
            f"{DATASET}: could not be had ({said}); --data FOLDER takes train.jsonl and test.jsonl"
        ) from error


def _questions(rows: Iterable[Any], place: str) -> list[Question]:
    return [_question(row, f"{place}, line {number}") for number, row in enumerate(rows, 1)]


def _question(row: Any, place: str) -> Question:
    text, solution = (row.get(name) if isinstance(row, Mapping) else None for name in ("question", "answer"))
    if not (isinstance(text, str) and isinstance(solution, str) and strict(solution) is not None):
        raise UsageError(
            f"{place}: not a GSM8K question: a text `question`, and an `answer` that ends in #### <number>"
        )
    return Question(text.strip(), solution.strip())
