"""`quantize --push` as a user runs it: through Xet, and ended while an upload hangs."""

import hashlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.calibrate.checkpoints import make, write_text
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.command import W8A8, cli
from tests.execute.runs import staging_of, wait_for
from tests.publish.hub import TOKEN, Hub, ask, receiving_hub
from w8a8 import Options, quantize
from w8a8.errors import HubError
from w8a8.execute.status import status
from w8a8.publish.sending import Upload

pytestmark = pytest.mark.slow

REPO = "me/llama-W8A8"
SHARDS = 4


@pytest.fixture
def hub() -> Iterator[Hub]:
    with receiving_hub() as hub:
        yield hub


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "llama", llama_tensors(), shards=SHARDS)


def env(hub: Hub, tmp_path: Path, xet: bool) -> dict[str, str]:
    values = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return values | {"HF_HUB_DISABLE_XET": "0" if xet else "1"}


def test_through_xet_the_same_result_is_committed_and_nothing_is_sent_twice(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    expected = folder_bytes(quantize(source, tmp_path / "whole").out)
    hub.fault = lambda _method, path: HTTPStatus.FORBIDDEN if "/commit/" in path else None
    command = ("quantize", source, "--push", REPO)
    assert cli(*command, env=env(hub, tmp_path, xet=True)).returncode == HubError.exit_code
    assert not hub.repositories[REPO].files
    assert status(tmp_path / "llama-W8A8").shards_sent == SHARDS
    assert hub.xorbs
    hub.fault = lambda _method, _path: None
    hub.requests.clear()
    run = cli(*command, env=env(hub, tmp_path, xet=True))
    assert run.returncode == 0, run.stderr
    assert not [request for request in hub.requests if "xorbs" in request]
    for name, content in expected.items():
        large = name.endswith(".safetensors")
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}".encode()
        assert hub.repositories[REPO].files[name] == (digest if large else content)
    assert not staging_of(tmp_path / "llama-W8A8").exists()


def test_a_calibrated_result_is_the_same_and_leaves_nothing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "small", num_hidden_layers=2)
    options = Options(recipe="smooth", calibration=str(write_text(tmp_path)), samples=4, tokens=48)
    expected = folder_bytes(quantize(tmp_path / "small", tmp_path / "whole", options).out)
    ask(hub, tmp_path / "cache", monkeypatch)
    before = {*tmp_path.iterdir()}
    quantize(tmp_path / "small", tmp_path / "small-W8A8", options, delivery=Upload.open(REPO, source="small"))
    assert {*tmp_path.iterdir()} == before
    shown = dict(hub.repositories[REPO].files)
    assert "smooth" in shown.pop("README.md").decode()
    assert shown == expected


@pytest.mark.parametrize("xet", [True, False])
def test_an_upload_that_hangs_does_not_keep_a_run_from_ending(
    hub: Hub, source: Path, tmp_path: Path, xet: bool
) -> None:
    released = threading.Event()

    def hang(_method: str, path: str) -> None:
        if "/xorbs/" in path or "/lfs/" in path:
            hub.requests.append("hangs")
            released.wait()

    hub.fault = hang
    command = [*W8A8, "quantize", str(source), "--push", REPO]
    with subprocess.Popen(
        command, env={**os.environ, **env(hub, tmp_path, xet)}, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: "hangs" in hub.requests, process)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=60)
        finally:
            released.set()
            process.kill()
    assert process.returncode == 130, said
    assert "the same command" in said
    assert status(tmp_path / "llama-W8A8").state == "interrupted"
