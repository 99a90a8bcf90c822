from pathlib import Path

import pytest

from tests.checkpoints import llama_tensors, write_checkpoint


@pytest.fixture
def golden() -> Path:
    """The small checkpoint with hard rows, and what other tools wrote for it."""
    return Path(__file__).parent / "golden"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A small random Llama in two BF16 shards."""
    return write_checkpoint(tmp_path / "llama", llama_tensors(), shards=2)
