"""Stock vLLM loads the most used architectures, dense ones in both formats, and computes what these say.

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

DENSE = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "glm4")
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "gemma4", "granitemoe", "granitemoeshared")
TRIED = [(name, form) for name in DENSE for form in FORMATS] + [(name, "compressed-tensors") for name in MIXTURES]
Found = Mapping[tuple[str, str], tuple[Answer, float | None]]


@pytest.fixture(scope="module")
def found(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What vLLM gives for each, and how far that is from the exact reference."""
    scratch, expected = tmp_path_factory.mktemp("architectures"), {}
    for name, form in TRIED:
        folder = scratch / f"{name}-{form}"
        row, exact = check(name, folder, form)
        assert not row.failed
        expected[folder / "result"] = (name, form), exact
    given = answers(vllm_python, [*expected], PROMPTS)
    return {expected[folder][0]: (answer, difference(answer, expected[folder][1])) for folder, answer in given}


@pytest.mark.parametrize(("name", "form"), TRIED)
def test_vllm_computes_what_the_format_says(name: str, form: str, found: Found) -> None:
    answer, largest = found[name, form]
    assert answer.error is None
    assert largest is not None
    assert largest <= table.VLLM_BOUNDS[answer.dtype]
