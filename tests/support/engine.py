"""Stock vLLM on many small checkpoints: started once, a process forked from it for each."""

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import msgspec

from tests.support.check import PROMPTS, Scores, Tried, reason

IN_VLLM = Path(__file__).with_name("in_vllm.py")
RESULT = "RESULT "
"""What the lines begin with that `in_vllm.py` means for us; engines write others."""


@dataclass(frozen=True)
class Answer:
    """What vLLM, computing in `dtype`, gave for the prompts, or why it did not; `known`: whether it has the model."""

    scores: Scores = ()
    dtype: str = "float32"
    error: str | None = None
    known: bool = True


Engine = Callable[[Path, Scores], Tried]
"""Runs a checkpoint and compares it with what is expected."""


@contextmanager
def started(python: Path) -> Iterator[Engine]:
    """vLLM in the environment of `python`, until the context ends."""
    with subprocess.Popen([python, IN_VLLM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, output = process.stdin, process.stdout

        def run(folder: Path, expected: Scores) -> Tried:
            print(json.dumps({"folder": str(folder), "prompts": PROMPTS}), file=asked, flush=True)
            line = next(line for line in output if line.startswith(RESULT))
            return compared(msgspec.json.decode(line.removeprefix(RESULT), type=Answer), expected, folder)

        yield run


def compared(answer: Answer, expected: Scores, folder: Path) -> Tried:
    """How far `answer` for `folder` is from what is `expected`."""
    if answer.error:
        return Tried(None, answer.dtype, reason(answer.error.replace(str(folder), "the model"), folder), answer.known)
    return Tried(distance(answer.scores, expected), answer.dtype)


def distance(some: Scores, others: Scores) -> float:
    """The largest difference of a log-probability in the middle one of the prompts, nats."""
    return median(max(abs(a - b) for a, b in zip(*both, strict=True)) for both in zip(some, others, strict=True))
