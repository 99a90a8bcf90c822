"""Models on the Hub that arrive while they are quantized, over real HTTP, from a server that fails now and then."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.hub import COMMIT, Hub, local_hub
from tests.checkpoints import folder_bytes, write_checkpoint
from tests.command import W8A8, cli
from tests.execute.runs import finished_shards, large_checkpoint, staging_of, wait_for
from tests.storage.conftest import SHARDS
from w8a8 import dry_run, quantize
from w8a8.checkpoint import remote
from w8a8.checkpoint.source import in_store
from w8a8.errors import HubError, W8A8Error
from w8a8.storage import download
from w8a8.storage.folders import taken

Files = Mapping[str, bytes]


@pytest.fixture
def whole(hub: Hub, tmp_path: Path) -> Files:
    """The result of the same model, downloaded before it is quantized."""
    return quantized(tmp_path / "whole", cache=True)


def quantized(out: Path, repo: str = "org/llama", **options: Any) -> Files:
    """What `quantize` makes of it; the source's cache, if there is any, is emptied."""
    quantize(repo, out, **options)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    return folder_bytes(out)


def test_the_result_is_that_of_a_model_downloaded_before(hub: Hub, whole: Files, tmp_path: Path) -> None:
    assert quantized(tmp_path / "out") == whole
    assert json.loads(whole["w8a8.json"])["source"]["revision"] == COMMIT
    assert not staging_of(tmp_path / "out").exists()
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_the_plan_is_made_without_a_shard(hub: Hub, tmp_path: Path) -> None:
    hub.repositories = {"org/large": folder_bytes(large_checkpoint(tmp_path / "source", shards=3, shard_mb=2))}
    plan = dry_run("org/large")
    assert plan.bytes_in > 5_900_000
    assert hub.sent < 1_000_000


FAULTS = ["cut", "short", "long", "wrong", "ruined", HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR,
          HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, HTTPStatus.NOT_FOUND]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, *FAULTS]), max_size=12))
def test_whatever_the_hub_does_the_result_is_whole_or_none(
    hub: Hub, whole: Files, tmp_path: Path, faults: list[HTTPStatus | str | None]
) -> None:
    left = list(faults)
    hub.fault = lambda name, begin: left.pop() if left and not name.endswith(".json") else None
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(len(faults) + 1):
        try:
            found = quantized(out)
            break
        except W8A8Error:
            assert not out.exists()
    assert found == whole
    assert not staging_of(out).exists()


def test_a_file_that_is_not_what_the_hub_says_of_it_is_never_used(hub: Hub, tmp_path: Path) -> None:
    name = f"model-00002-of-0000{SHARDS}.safetensors"
    hub.digests[name] = "0" * 64
    with pytest.raises(HubError, match=rf"org/llama@{COMMIT}, {name}: .*its hash is not the one that the Hub gives"):
        quantize("org/llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob(f".{name}.part"))


def test_a_config_that_is_not_what_the_hub_says_of_it_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.fault = lambda name, _: "wrong" if name == "config.json" else None
    with pytest.raises(W8A8Error, match=r"org/llama/config\.json"):
        quantize("org/llama", tmp_path / "out")


@pytest.mark.parametrize("dated", [False, True])
def test_a_hub_that_asks_to_wait_is_given_the_time(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dated: bool
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download, "wait", lambda seconds, _: waits.append(seconds))
    hub.wait = formatdate(time.time() + 100, usegmt=True) if dated else "100"
    left = [HTTPStatus.TOO_MANY_REQUESTS, None, None, None, None]  # the headers come first
    hub.fault = lambda name, _: left.pop() if left and name.endswith(".safetensors") else None
    quantize("org/llama", tmp_path / "out")
    assert len(waits) == 1
    assert 90 < waits[0] <= 100


def test_a_hub_that_only_fails_is_given_up_and_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    last = f"model-0000{SHARDS}-of-0000{SHARDS}.safetensors"
    asked: list[str] = []

    def fault(name: str, _: int) -> HTTPStatus | None:
        asked.append(name)
        return HTTPStatus.SERVICE_UNAVAILABLE if name == last and asked.count(last) > 1 else None  # not for its header

    hub.fault = fault
    with pytest.raises(HubError, match=rf"{last}: the Hub did not deliver it \(the Hub answered 503\).*same command"):
        quantize("org/llama", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("times", [remote.START_ATTEMPTS - 1, remote.START_ATTEMPTS])
@pytest.mark.parametrize("fault", [HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS, "cut"])
def test_what_the_plan_is_made_from_is_asked_for_again(hub: Hub, fault: HTTPStatus | str, times: int) -> None:
    left = [fault] * times
    hub.fault = lambda name, _: left.pop() if left and name == "config.json" else None
    if times < remote.START_ATTEMPTS:
        assert dry_run("org/llama").source == "org/llama"
    else:
        with pytest.raises(HubError, match=r"config\.json: the Hub did not deliver it .*same command"):
            dry_run("org/llama")
    assert not left


def test_another_server_gets_the_request_but_not_the_token(
    hub: Hub, whole: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with local_hub(hub.repositories) as storage:
        hub.other = storage.url.replace("127.0.0.1", "localhost")
        hub.fault = lambda name, _: "elsewhere" if name.endswith(".safetensors") else None
        assert quantized(tmp_path / "out") == whole
    assert {request.token for request in storage.requests} == {None}
    assert any(request.token for request in hub.requests)


def test_no_more_is_held_than_the_budget(hub: Hub, tmp_path: Path) -> None:
    source = large_checkpoint(tmp_path / "source", shards=8, shard_mb=2)
    hub.repositories = {"org/large": folder_bytes(source)}
    held: list[int] = []

    def look(_: int) -> None:
        files = (tmp_path / ".out.w8a8" / "source").rglob("*.safetensors*")
        held.append(sum(map(taken, files)))

    quantize("org/large", tmp_path / "out", disk_budget=5_000_000, workers=1, advance=look)
    assert 2_000_000 < max(held) < 5_000_000 + 8 * 20_000
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 8


def test_scales_in_another_shard_are_there(hub: Hub, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (128, 256), np.uint8)
    name = "model.layers.0.mlp.down_proj.weight"
    source = tmp_path / "source"
    tensors = {name: ("F8_E4M3", codes), f"{name}_scale_inv": ("F32", rng.random((1, 2), np.float32) + 0.5)}
    write_checkpoint(source, tensors, shards=2)
    assert len(list(source.glob("*.safetensors"))) == 2
    hub.repositories = {"org/fp8": folder_bytes(source)}
    assert quantized(tmp_path / "out", "org/fp8") == quantized(tmp_path / "whole", "org/fp8", cache=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_goes_on_and_fetches_nothing_twice(
    hub: Hub, tmp_path: Path, number: signal.Signals
) -> None:
    source = large_checkpoint(tmp_path / "source", shards=6, shard_mb=8)
    hub.repositories = {"org/large": folder_bytes(source)}
    expected = quantized(tmp_path / "whole", "org/large", cache=True)
    out = tmp_path / "out"
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([*W8A8, "quantize", "org/large", str(out), "--workers", "1"],
                               env={**os.environ, **env}, stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: finished_shards(out) >= 2, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    done = finished_shards(out)
    assert not out.exists()
    assert done >= 2
    hub.requests.clear()
    run = cli("quantize", "org/large", str(out), "--workers", "1", env=env)
    assert run.returncode == 0, run.stderr
    assert f"resuming: {done} of 6" in run.stderr
    asked = [request.path.rpartition("/")[2] for request in hub.requests if request.path.endswith(".safetensors")]
    again = [name for name in set(asked) if asked.count(name) > 1]  # each header once, and whole what was missing
    assert len(again) <= 6 - done
    assert folder_bytes(out) == expected


def test_an_address_on_the_hub_is_its_id(hub: Hub) -> None:
    plan = dry_run("hf://org/llama@v1")
    assert (plan.source, plan.revision) == ("org/llama", COMMIT)
    assert not in_store("hf://org/llama@v1")
    assert in_store("hf://org/llama/folder")
    assert in_store("hf://datasets/org/llama")


def test_a_budget_that_is_no_size_is_a_usage_error(hub: Hub, tmp_path: Path) -> None:
    run = cli("quantize", "org/llama", str(tmp_path / "out"), "--disk-budget", "20 apples")
    assert run.returncode == 2
    assert "--disk-budget: '20 apples' is no size" in run.stderr
