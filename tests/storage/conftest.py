"""A Hub on this machine that these tests ask for a small Llama, and a bucket of a real S3 server."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoint.hub import Hub, local_hub
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.storage.buckets import Bucket, bucket_at, s3_server
from w8a8.checkpoint import remote
from w8a8.storage import download

Files = Mapping[str, bytes]
SHARDS = 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in a folder here."""
    folder = write_checkpoint(tmp_path_factory.mktemp("here") / "llama", llama_tensors(), shards=SHARDS)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with the small Llama, which this process asks; failed requests are repeated without a wait."""
    for module in (download, remote):
        monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)
    with local_hub({"org/llama": folder_bytes(llama)}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real S3 server."""
    with s3_server(tmp_path_factory.mktemp("s3") / "moto.log") as url:
        yield url


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket, which this process asks; failed requests are repeated without a wait."""
    for module in (download, remote):
        monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)
    with bucket_at(s3) as bucket:
        for name, value in bucket.env.items():
            monkeypatch.setenv(name, value)
        yield bucket
