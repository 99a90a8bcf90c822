"""GSM8K's questions, and the prompts that put them to a model.

The data set's answers end in `#### <number>`, and a model is asked to answer in this form. Examples show these answers
unchanged, calculator annotations (`<<48/2=24>>`) included, as lm-evaluation-harness does.

K. Cobbe et al., "Training Verifiers to Solve Math Word Problems", 2021 (MIT licence).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w8a8.errors import SourceNotFoundError, UnreadableError, UsageError
from w8a8.evals.gsm8k.scoring import strict
from w8a8.texts import datasets
from w8a8.texts.files import read, rows, strings

DATASET = "openai/gsm8k"
FILES = "train.jsonl and test.jsonl"
ANSWER_FORMAT = "#### <answer>"
INSTRUCTION = f"Solve the problem step by step. Give the final answer alone on the last line, as: {ANSWER_FORMAT}"
STOP = ("Question:", "</s>", "<|im_end|>")
"""Strings that end a completion: a base model would go on with another question."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the data set's answer, which ends in `#### <number>`."""

    text: str
    solution: str

    @property
    def gold(self) -> str:
        """The right answer as a plain number: `1080`."""
        return str(strict(self.solution))


@dataclass(frozen=True, slots=True)
class Data:
    """The examples to show and the questions to ask, both in order."""

    examples: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def sha256(self) -> str:
        """The hash of the questions and their right answers."""
        return _sha256([[q.text, q.gold] for q in self.questions])


def load(folder: Path | None, *, shots: int, limit: int | None = None) -> Data:
    """Load the first `shots` training examples and the first `limit` test questions (None: all).

    They come from `train.jsonl` and `test.jsonl` in `folder`, or from the Hub. Raises UsageError naming the file and
    line that is not a question with its answer, HubError, MissingExtraError.
    """
    (train_name, train), (test_name, test) = (_split(folder, split) for split in ("train", "test"))
    if not test:
        raise UsageError(f"{test_name}: no questions; --data names a folder with {FILES}")
    if shots > len(train):
        raise UsageError(f"--shots {shots}: {train_name} has {len(train)} examples; give at most --shots {len(train)}")
    return Data(tuple(train[:shots]), tuple(test[:limit]))


def request(question: str, examples: Sequence[Question], *, completions: bool) -> dict[str, Any]:
    """The part of an API request that holds the question: a chat, or a text to complete and where to stop."""
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
    """The question as a turn of a chat, with the instruction."""
    return f"{question}\n\n{INSTRUCTION}"


def prompt_sha256(examples: Sequence[Question], *, completions: bool) -> str:
    """The hash of everything that is sent except the question."""
    return _sha256(request("{question}", examples, completions=completions))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _split(folder: Path | None, split: str) -> tuple[str, list[Question]]:
    """A split's name and its questions."""
    if folder is None:
        name = f"{DATASET} {split}"
        records = datasets.load(DATASET, "main", split, otherwise=f"--data FOLDER takes {FILES}")
        return name, [_question(row, f"{name}, record {number}") for number, row in enumerate(records, 1)]
    path = folder / f"{split}.jsonl"
    try:
        text = read(path)
    except (SourceNotFoundError, UnreadableError) as error:
        raise UsageError(f"{error}; --data names a folder with {FILES}") from error
    return str(path), [_question(row, place) for place, row in rows(text, str(path))]


def _question(row: Any, place: str) -> Question:
    found = strings(row, "question", "answer")
    if found is None or strict(found[1]) is None:
        raise UsageError(
            f"{place}: not a GSM8K question: a text `question`, and an `answer` that ends in #### <number>"
        )
    text, solution = found
    return Question(text.strip(), solution.strip())
