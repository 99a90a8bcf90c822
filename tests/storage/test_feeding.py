"""Shards that are quantized while they arrive: what is read before it can be trusted, over real HTTP."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.hub import COMMIT, Hub
from tests.checkpoints import folder_bytes, write_checkpoint
from tests.command import W8A8
from tests.execute.runs import finished_shards, large_checkpoint, staging_of, wait_for
from w8a8 import quantize, verify
from w8a8.checkpoint import stream
from w8a8.checkpoint.hub import HubFolder
from w8a8.errors import HubError, NonFiniteWeightError, SourceError
from w8a8.execute.status import status
from w8a8.storage import download

SIZE = 6_000_000
"""Some bytes of a shard, to be quantized in blocks of 64 KiB."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK_BYTES", 1 << 16)


@pytest.fixture
def large(hub: Hub, tmp_path: Path) -> Path:
    """A model of one shard, on the Hub as org/large."""
    return serve(hub, large_checkpoint(tmp_path / "source", shards=1, shard_mb=6))


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened at the end at the latest, for whoever waits."""
    opened = threading.Event()
    yield opened
    opened.set()


def serve(hub: Hub, folder: Path) -> Path:
    hub.repositories = {"org/large": folder_bytes(folder)}
    return folder


def expected(folder: Path) -> dict[str, bytes]:
    """The result of the same model, downloaded before."""
    if not folder.exists():
        quantize("org/large", folder, cache=True)
        shutil.rmtree(constants.HF_HUB_CACHE)
    return folder_bytes(folder)


def once(fault: str, at: Callable[[str, int], bool]) -> Callable[[str, int], str | None]:
    """Fail one request, the first that `at` says."""
    left = [fault]
    return lambda name, begin: left.pop() if left and at(name, begin) else None


def downloads(name: str, asked: list[str]) -> bool:
    """Whether a request for a file is the one behind that for its header."""
    asked.append(name)
    return name.endswith(".safetensors") and asked.count(name) == 2


def slowed(hub: Hub, gate: threading.Event) -> tuple[list[int], list[bool], Callable[[int], None]]:
    """Have the Hub keep a file's second half back until a third of it is done.

    What was done, whether the halves were waited for long enough, and what is to be called with bytes done.
    """
    done: list[int] = []
    waited: list[bool] = []

    def advance(nbytes: int) -> None:
        done.append(nbytes)
        if sum(done) > SIZE // 3:
            gate.set()

    hub.pace = lambda _, begin: waited.append(gate.wait(60)) if begin > SIZE // 2 else None
    return done, waited, advance


def test_a_shard_is_quantized_while_it_arrives(hub: Hub, large: Path, tmp_path: Path, gate: threading.Event) -> None:
    done, waited, advance = slowed(hub, gate)
    quantize("org/large", tmp_path / "out", advance=advance)
    assert waited
    assert all(waited)
    assert sum(done) == sum(file.stat().st_size for file in large.glob("*.safetensors"))
    hub.pace = lambda _, __: None
    assert folder_bytes(tmp_path / "out") == expected(tmp_path / "expected")


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["cut", "short", "wrong", "ruined"]), max_size=2), st.integers(1, 3))
def test_whatever_arrives_first_the_result_is_right_and_every_byte_counts_once(
    hub: Hub, tmp_path: Path, faults: list[str], number: int
) -> None:
    source = tmp_path / "source"
    if not source.exists():
        large_checkpoint(source, shards=2, shard_mb=1)
    serve(hub, source)
    hub.fault = lambda _, __: None
    whole = expected(tmp_path / "expected")
    asked: list[str] = []
    left = {f"model-{number % 2 + 1:05}-of-00002.safetensors": list(faults)}

    def fault(name: str, _: int) -> str | None:
        asked.append(name)
        return left[name].pop() if asked.count(name) > 1 and left.get(name) else None

    hub.fault = fault
    done: list[int] = []
    quantize("org/large", tmp_path / "out", overwrite=True, advance=done.append, workers=number)
    assert not any(left.values())
    assert folder_bytes(tmp_path / "out") == whole
    assert sum(done) == sum(file.stat().st_size for file in source.glob("*.safetensors"))


def test_of_a_file_that_never_is_right_nothing_is_kept(
    hub: Hub, large: Path, tmp_path: Path, gate: threading.Event
) -> None:
    hub.digests["model.safetensors"] = "0" * 64
    done: list[int] = []

    def advance(nbytes: int) -> None:
        done.append(nbytes)
        if sum(done) > SIZE * 2 // 3:  # of the rest, a part is on its way
            gate.set()

    waited: list[bool] = []
    hub.pace = lambda _, begin: waited.append(gate.wait(60)) if begin > SIZE - 100_000 else None
    with pytest.raises(HubError, match="its hash is not the one that the Hub gives"):
        quantize("org/large", tmp_path / "out", advance=advance)
    assert waited
    assert all(waited)
    assert not (tmp_path / "out").exists()
    assert not staging_of(tmp_path / "out").exists()


def test_an_infinite_weight_is_believed_only_of_the_right_file(hub: Hub, tmp_path: Path) -> None:
    values = np.zeros((500, 512), np.float32)
    serve(hub, write_checkpoint(tmp_path / "source", {"model.layers.0.mlp.down_proj.weight": ("BF16", values)}))
    asked: list[str] = []
    hub.fault = once("ruined", lambda name, _: downloads(name, asked))  # zeros become NaN
    quantize("org/large", tmp_path / "out")
    values[-1, -1] = np.inf
    serve(hub, write_checkpoint(tmp_path / "other", {"model.layers.0.mlp.down_proj.weight": ("BF16", values)}))
    with pytest.raises(NonFiniteWeightError, match="infinity in row 499"):
        quantize("org/large", tmp_path / "out2")


def test_what_fails_elsewhere_is_said_while_a_shard_still_arrives(
    hub: Hub, tmp_path: Path, gate: threading.Event
) -> None:
    rows = {f"model.layers.{i}.mlp.down_proj.weight": ("BF16", np.zeros((2000, 256), np.float32)) for i in range(2)}
    rows["model.layers.1.mlp.down_proj.weight"][1][7] = np.nan
    serve(hub, write_checkpoint(tmp_path / "source", rows, shards=2))
    first = "model-00001-of-00002.safetensors"
    hub.pace = lambda name, begin: (gate.wait(0.1), None)[1] if name == first and begin > 100_000 else None
    began = time.monotonic()
    with pytest.raises(NonFiniteWeightError, match="NaN in row 7"):
        quantize("org/large", tmp_path / "out", workers=2)
    assert not gate.is_set()
    assert time.monotonic() - began < 60
    gate.set()
    hub.pace = lambda _, __: None
    assert not (tmp_path / "out").exists()


def test_an_interrupt_ends_the_wait_and_what_came_is_kept(hub: Hub, large: Path, tmp_path: Path) -> None:
    hub.pace = lambda _, begin: time.sleep(0.1) if begin > SIZE // 2 else None
    out, env = tmp_path / "out", {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen(
        [*W8A8, "quantize", "org/large", str(out)], env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    )
    part = staging_of(out) / "source" / COMMIT / ".model.safetensors.part"
    wait_for(lambda: part.exists() and part.stat().st_size > SIZE // 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, out.exists()) == (130, False), errors
    assert status(out).downloaded > SIZE // 3
    hub.pace = lambda _, __: None
    sent = hub.sent
    quantize("org/large", out)
    assert hub.sent - sent < SIZE
    assert folder_bytes(out) == expected(tmp_path / "expected")


def test_scales_that_came_wrong_before_their_shard_are_found(hub: Hub, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (128, 256), np.uint8)
    name = "model.layers.0.mlp.down_proj.weight"
    scales = rng.random((1, 2), np.float32) + 0.5
    tensors = {
        name: ("F8_E4M3", codes),
        f"{name}_scale_inv": ("F32", scales),
        "odd": ("U8", codes),
        "more": ("F32", scales),
    }
    serve(hub, write_checkpoint(tmp_path / "source", tensors, shards=2))
    hub.fault = once("wrong", lambda name, begin: name.endswith(".safetensors") and begin > 0)
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors: the Hub sent other bytes"):
        quantize("org/large", tmp_path / "out")
    assert finished_shards(tmp_path / "out") == 0
    quantize("org/large", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "w8a8.json").read_text())["quantized_tensors"] == 1
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_a_source_is_verified_while_it_arrives_and_again_where_it_came_wrong(
    hub: Hub, large: Path, tmp_path: Path, gate: threading.Event
) -> None:
    quantize("org/large", tmp_path / "out")
    done, waited, advance = slowed(hub, gate)
    asked: list[str] = []
    hub.fault = once("ruined", lambda name, _: downloads(name, asked))
    assert verify(tmp_path / "out", "org/large", advance=advance).ok
    assert all(waited)
    assert min(done) < 0  # what was read of the wrong one
    assert sum(done) == sum(file.stat().st_size for file in large.glob("*.safetensors"))
    hub.digests["model.safetensors"] = "0" * 64
    with pytest.raises(HubError, match="its hash is not the one"):
        verify(tmp_path / "out", "org/large")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "source"]


def test_who_waits_for_bytes_can_stop(hub: Hub, tmp_path: Path) -> None:
    files = folder_bytes(large_checkpoint(tmp_path / "source", shards=1, shard_mb=2))
    hub.repositories, gate = {"org/large": files}, threading.Event()
    folder = HubFolder.find("org/large", None)
    [name] = [name for name in files if name.endswith(".safetensors")]
    hub.pace = lambda _, begin: (gate.wait(60), None)[1] if begin > 10**6 else None
    pieces = folder.body(folder.files[name], 0)
    came = [*islice(pieces, 3)]
    assert came[-1] == b""
    gate.set()
    assert b"".join([*came, *pieces]) == files[name]


def test_who_waits_for_headers_can_stop(hub: Hub, tmp_path: Path) -> None:
    gate = threading.Event()
    hub.pace = lambda name, _: (gate.wait(60), None)[1] if name.endswith(".safetensors") else None
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    process = subprocess.Popen([*W8A8, "quantize", "org/llama", str(tmp_path / "out")],
                               env=env, stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: any(name.endswith(".safetensors") for name in hub.downloads), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)  # before the silent server is given up
    gate.set()
    assert (process.returncode, errors) == (130, "\nw8a8: interrupted; nothing was begun\n")


def test_a_server_that_gives_next_to_nothing_is_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories = {"org/large": folder_bytes(large_checkpoint(tmp_path / "source", shards=1, shard_mb=8))}
    folder = HubFolder.find("org/large", None)
    [file] = [file for name, file in folder.files.items() if name.endswith(".safetensors")]
    hub.fault = lambda _name, _begin: "byte"
    hub.requests.clear()
    with pytest.raises(HubError, match=r"the Hub did not deliver it .*; what came is kept"):
        download.fetch(folder, file, tmp_path / "part")
    assert len(hub.requests) == (tmp_path / "part").stat().st_size == download.ATTEMPTS
    hub.fault, hub.pace = lambda _name, _begin: None, lambda _name, begin: time.sleep(0.6 if begin > 6 else 0)
    for name, value in (("ATTEMPTS", 2), ("LEAST_SECONDS", 0.1)):
        monkeypatch.setattr(download, name, value)
    with pytest.raises(HubError, match=r"bytes came in 0 s\)"):
        download.fetch(folder, file, tmp_path / "part")
    hub.pace = lambda _name, begin: time.sleep(0.02)  # 64 KiB each
    download.fetch(folder, file, tmp_path / "part")
    assert (tmp_path / "part").stat().st_size == file.size
