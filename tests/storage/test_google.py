"""From a bucket on Google Cloud Storage to one, on an emulator in a process of its own."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

from tests.checkpoints import folder_bytes
from tests.command import cli
from tests.execute.runs import large_checkpoint
from tests.servers import free_port, started
from w8a8 import quantize
from w8a8.errors import TargetExistsError

EMULATOR = "from gcp_storage_emulator.__main__ import main; main()"


@pytest.fixture(scope="module")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of the emulator, which has the bucket `models`."""
    port, output = free_port(), tmp_path_factory.mktemp("google") / "emulator.log"
    url = f"http://127.0.0.1:{port}"
    options = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "models"]

    def ready() -> bool:
        try:
            return bool(ask(f"{url}/storage/v1/b"))
        except OSError:
            return False

    with started([sys.executable, "-c", EMULATOR, *options], output) as running:
        running.wait_until(ready, "ready")
        yield url


def ask(url: str, content: bytes | None = None) -> bytes:
    with urlopen(Request(url, content, {"Content-Type": "application/octet-stream"}), timeout=20) as answer:
        return bytes(answer.read())


def put(google: str, folder: Path, prefix: str) -> str:
    """Upload a folder; return its address."""
    for path in folder.iterdir():
        name = quote(f"{prefix}/{path.name}", safe="")
        ask(f"{google}/upload/storage/v1/b/models/o?uploadType=media&name={name}", path.read_bytes())
    return f"gs://models/{prefix}"


def read(google: str, prefix: str) -> dict[str, bytes]:
    """All objects below a prefix."""
    listing: Mapping[str, Any] = json.loads(ask(f"{google}/storage/v1/b/models/o?prefix={quote(prefix)}/"))
    return {
        item["name"].removeprefix(f"{prefix}/"): ask(
            f"{google}/download/storage/v1/b/models/o/{quote(item['name'], safe='')}?alt=media"
        )
        for item in listing.get("items", ())
    }


@pytest.mark.slow
def test_from_a_bucket_to_a_bucket(google: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Without the last one, gcsfs asks over gRPC what kind of bucket it is, which emulators do not know.
    env = {"STORAGE_EMULATOR_HOST": google, "FSSPEC_GCS_TOKEN": "anon", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    folder = large_checkpoint(tmp_path / "large", shards=2, shard_mb=12)  # a shard goes by parts from 5 MB on
    address = put(google, folder, "some/large")
    run = cli("quantize", address, "gs://models/out", env=env)
    assert run.returncode == 0, run.stderr
    quantize(folder, tmp_path / "whole", hash_source=True)
    assert read(google, "out") == folder_bytes(tmp_path / "whole")
    run = cli("quantize", address, "gs://models/out", env=env)
    assert run.returncode == TargetExistsError.exit_code, run.stderr
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "whole"]
