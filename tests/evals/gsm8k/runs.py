"""Runs of `w8a8 eval gsm8k`, in this process and in one of their own."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.command import W8A8, cli
from tests.evals.api import KEY
from w8a8.evals.asking import Server
from w8a8.evals.gsm8k.questions import load
from w8a8.evals.gsm8k.run import Result, evaluate

QUESTIONS = 20
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(url: str, data: Path, out: Path, *, key: str = KEY, timeout: float = 60, shots: int = 8, **how: Any) -> Result:
    server = Server(url, key, timeout, how.pop("others", ()))
    return evaluate(server, load(data, shots=shots, limit=how.pop("limit", None)), out=out, **how)


def command(*arguments: str) -> list[str]:
    return [*W8A8, "eval", "gsm8k", *arguments]


def gsm8k(*arguments: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
    """Run `w8a8 eval gsm8k` to its end, which takes as long as the model does."""
    return cli("eval", "gsm8k", *arguments, env=ENVIRONMENT, check=check, timeout=None)


def outcomes(path: Path) -> Any:
    return json.loads(path.read_text())["outcomes"]


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
