"""A small model, a stand-in for vLLM, and a port."""

from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint
from tests.serve import fake_vllm
from tests.serve.launching import CONFIG, NO_KEYS
from tests.servers import free_port


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small Llama that an engine would be told to load; nothing here does."""
    return write_checkpoint(tmp_path / "model", llama_tensors(), config=CONFIG)


@pytest.fixture
def vllm(tmp_path: Path) -> dict[str, str]:
    """An environment with the stand-in, as a CPU build."""
    return NO_KEYS | fake_vllm.install(tmp_path / "vllm", "0.32.0+cpu")


@pytest.fixture
def port() -> int:
    return free_port()
