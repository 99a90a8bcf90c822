"""A Hub on this machine that these tests ask for a small Llama."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoint.hub import Hub, local_hub
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from w8a8.storage import download

Files = Mapping[str, bytes]
SHARDS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "llama", llama_tensors(), shards=SHARDS)
    (folder / "tokenizer.json").write_text("{}")
    return folder_bytes(folder)


@pytest.fixture
def hub(llama: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the small Llama, which this process asks; failed requests are repeated without a wait."""
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.0)
    with local_hub({"org/llama": llama}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub
