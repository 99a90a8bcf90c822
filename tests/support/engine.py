"""Stock vLLM on many small checkpoints, several in a process, a new process where one of them ends it."""

import json
import selectors
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

import msgspec

from tests.support.check import Scores

IN_VLLM = Path(__file__).with_name("in_vllm.py")
RESULT = "RESULT "
"""What the lines begin with that `in_vllm.py` means for us; engines write others."""
PATIENCE = 900.0
"""Seconds a process may take until its next result: starting vLLM takes a busy machine minutes."""


@dataclass(frozen=True)
class Answer:
    """What vLLM, computing in `dtype`, gave for the prompts, or why it did not."""

    scores: Scores = ()
    dtype: str = "float32"
    error: str | None = None


def answers(python: Path, folders: Sequence[Path], prompts: Sequence[Sequence[int]]) -> Iterator[tuple[Path, Answer]]:
    """What vLLM in the environment of `python` gives for `prompts`, folder by folder, in order."""
    for folder in folders:
        (folder / "prompts.json").write_text(json.dumps(prompts))
    left = list(folders)
    while left:
        command = [python, IN_VLLM, *left]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in _results(process.stdout):
                answer = msgspec.json.decode(line, type=Answer)
                yield left.pop(0), answer
                if answer.error:  # what it leaves behind may break the next one
                    break
            else:
                if left:
                    yield left.pop(0), Answer(error=f"vLLM's process ended, or gave nothing for {PATIENCE:.0f} s")
            process.kill()


def _results(output: IO[str]) -> Iterator[str]:
    """The lines that hold results, until the process closes its output or takes too long."""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while selector.select(PATIENCE) and (line := output.readline()):
            if line.startswith(RESULT):
                yield line.removeprefix(RESULT)


def difference(answer: Answer, exact: Scores) -> float | None:
    """The largest difference of a log-probability from the exact one in the middle one of the prompts, in nats."""
    if answer.error:
        return None
    return median(
        max(abs(ours - wanted) for ours, wanted in zip(*both, strict=True))
        for both in zip(answer.scores, exact, strict=True)
    )
