"""The real engines: stock vLLM in an environment of its own, built by scripts/make_vllm.py, and the embedded one."""

from pathlib import Path

import pytest

ENVIRONMENT = Path(__file__).parents[2] / ".venv-vllm"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The Python of the environment that has vLLM for the CPU."""
    if not (ENVIRONMENT / "ready").is_file():
        pytest.skip("there is no environment with vLLM; python scripts/make_vllm.py .venv-vllm builds one")
    return ENVIRONMENT / "bin" / "python"
