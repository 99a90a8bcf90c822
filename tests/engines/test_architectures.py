"""Stock vLLM loads the most used architectures in every format that it takes, and computes what the format says.

`make support` does so for all architectures: `docs/support.md`. Each is a tiny random model; all run in one process of
vLLM's, as in `tests/support/in_vllm.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support import table
from tests.support.check import PROMPTS, check
from tests.support.engine import Answer, answers, difference
from w8a8.formats import FORMATS
from w8a8.plan.rules import Rules

MOST_USED = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3"),
    *("qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "glm4_moe", "gemma4", "granitemoe", "granitemoeshared"),
)
TRIED = [
    (model_type, name)
    for model_type in MOST_USED
    for name in FORMATS
    if name in Rules.for_config({"model_type": model_type}).spellings
]
Found = Mapping[tuple[str, str], tuple[Answer, float | None]]


@pytest.fixture(scope="module")
def found(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What vLLM gives for each, and how far that is from the exact reference."""
    scratch, expected = tmp_path_factory.mktemp("architectures"), {}
    for model_type, name in TRIED:
        folder = scratch / f"{model_type}-{name}"
        row, exact = check(model_type, folder, name)
        assert not row.failed
        expected[folder / "result"] = (model_type, name), exact
    given = answers(vllm_python, [*expected], PROMPTS)
    return {expected[folder][0]: (answer, difference(answer, expected[folder][1])) for folder, answer in given}


@pytest.mark.parametrize(("model_type", "name"), TRIED)
def test_vllm_computes_what_the_format_says(model_type: str, name: str, found: Found) -> None:
    answer, largest = found[model_type, name]
    assert answer.error is None
    assert largest is not None
    assert largest <= table.VLLM_BOUNDS[answer.dtype]
