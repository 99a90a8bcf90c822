"""Reads the result of a GSM8K run back: a user's file, so nothing in it is trusted before it was looked at."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from w8a8.errors import InvalidResultError
from w8a8.evals.gsm8k.run import KIND, SCORES

_OUTCOME: Mapping[str, type] = {
    "index": int,
    "question": str,
    "gold": str,
    "answer": str,
    "strict": bool,
    "flexible": bool,
}


def read(path: Path) -> dict[str, Any]:
    """The result in `path`, as `Result.to_dict` made it. Raises `InvalidResultError` saying what is wrong with it.

    Checked are the outcomes, the protocol and the model; and that the counts are those of the outcomes.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidResultError(
            f"{path}: cannot be read ({error}); it should be a result of `w8a8 eval gsm8k`"
        ) from error
    if not isinstance(result, dict) or result.get("kind") != KIND or result.get("schema") != 1:
        raise InvalidResultError(f"{path}: not a result of `w8a8 eval gsm8k` that this version knows")
    if problem := _problem(result):
        raise InvalidResultError(f"{path}: {problem}; was it changed? `w8a8 eval gsm8k` with its --out writes it anew")
    return result


def _problem(result: Mapping[str, Any]) -> str:
    """What is wrong with a result, else nothing."""
    outcomes = result.get("outcomes")
    if not isinstance(result.get("model"), str) or not isinstance(result.get("protocol"), dict):
        return "it names no model or no protocol"
    if not isinstance(outcomes, list) or not outcomes:
        return "it has no outcomes"
    for i, outcome in enumerate(outcomes):
        if not isinstance(outcome, dict) or not all(isinstance(outcome.get(n), kind) for n, kind in _OUTCOME.items()):
            return f"outcome {i} is not one"
    if len({outcome["index"] for outcome in outcomes}) != len(outcomes):
        return "a question stands twice"
    for score in SCORES:
        said = result.get(score)
        if not isinstance(said, dict) or said.get("correct") != sum(outcome[score] for outcome in outcomes):
            return f"{score}.correct is not the number of right outcomes"
    return ""
