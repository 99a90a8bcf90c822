"""Reads back the result of a GSM8K run: a user's file, so that everything in it is checked before it is used."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from w8a8.errors import InvalidResultError, first_line
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
    """Read the result in `path`, as `Result.to_dict` made it. Raises InvalidResultError naming the first problem.

    It must have a model, a protocol and outcomes, and its counts must be those of the outcomes.
    """
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidResultError(
            f"{path}: cannot be read as JSON ({first_line(error)}); give a result of `w8a8 eval gsm8k`"
        ) from error
    if not isinstance(result, dict) or result.get("kind") != KIND or result.get("schema") != 1:
        raise InvalidResultError(
            f"{path}: not a result of `w8a8 eval gsm8k`, or one of a version that this one cannot read"
        )
    if problem := _problem(result):
        raise InvalidResultError(
            f"{path}: {problem}; was the file changed? `w8a8 eval gsm8k --out {path}` writes it again"
        )
    return result


def _problem(result: Mapping[str, Any]) -> str:
    """The first problem of a result, empty if there is none."""
    outcomes = result.get("outcomes")
    if not isinstance(result.get("model"), str) or not isinstance(result.get("protocol"), dict):
        return "it names no model or no protocol"
    if not isinstance(outcomes, list) or not outcomes:
        return "it has no outcomes"
    for i, outcome in enumerate(outcomes):
        if not isinstance(outcome, dict) or not all(isinstance(outcome.get(n), kind) for n, kind in _OUTCOME.items()):
            return f"outcome {i} lacks a field, or has one of a wrong type"
    if len({outcome["index"] for outcome in outcomes}) != len(outcomes):
        return "it has two outcomes of one question"
    for score in SCORES:
        said = result.get(score)
        if not isinstance(said, dict) or said.get("correct") != sum(outcome[score] for outcome in outcomes):
            return f"{score}.correct is not the number of right outcomes"
    return ""
