"""Stock vLLM loads the most used architectures, dense ones in both formats, and computes what these say.

`make support` does so for all architectures: `docs/support.md`. Each is a tiny random model; vLLM is started once
for all, as in `tests/support/in_vllm.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import table
from tests.support.check import check
from tests.support.engine import Engine, started
from w8a8.formats import FORMATS

DENSE = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "glm4")
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "gemma4", "granitemoe", "granitemoeshared", "aria")
TRIED = [
    *((name, form) for name in DENSE for form in FORMATS),
    *((name, "compressed-tensors") for name in MIXTURES),
    *((name, "quark") for name in ("qwen3_moe", "gemma4")),
]


@pytest.fixture(scope="module")
def vllm(vllm_python: Path) -> Iterator[Engine]:
    """vLLM, started once for all."""
    with started(vllm_python) as engine:
        yield engine


@pytest.mark.parametrize(("name", "form"), TRIED)
def test_vllm_computes_what_the_format_says(name: str, form: str, vllm: Engine, tmp_path: Path) -> None:
    row, expected = check(name, tmp_path, form)
    assert not row.failed
    assert expected is not None
    found = vllm(tmp_path / "result", expected.result)
    assert found.failed is None
    assert table.agrees(found)
