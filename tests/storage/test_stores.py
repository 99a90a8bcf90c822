"""Models in an object store that arrive while they are quantized, from a real S3 server that fails now and then."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest
from fsspec.registry import _registry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.command import W8A8, cli
from tests.execute.runs import finished_shards, large_checkpoint, staging_of, wait_for
from tests.storage.buckets import BUCKET, Bucket, Fault, Request, is_shard
from tests.storage.conftest import SHARDS
from w8a8 import Options, convert, dry_run, inspect, quantize, verify
from w8a8.checkpoint import stores
from w8a8.checkpoint.remote import NotDeliveredError
from w8a8.errors import (
    MissingExtraError,
    NoConfigError,
    PickleOnlyError,
    SourceChangedError,
    SourceNotFoundError,
    StoreError,
    UsageError,
    W8A8Error,
)

NAME = f"model-00002-of-0000{SHARDS}.safetensors"


@pytest.fixture(scope="module")
def here(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The result of the same model in a folder here."""
    out = tmp_path_factory.mktemp("result") / "out"
    quantize(llama, out, hash_source=True)
    return folder_bytes(out)


@pytest.fixture
def source(bucket: Bucket, llama: Path) -> str:
    """The address of the model in the bucket."""
    return bucket.put(llama, "some/llama")


def test_the_result_is_that_of_the_same_folder_here(source: str, here: Mapping[str, bytes], tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    assert folder_bytes(tmp_path / "out") == here
    assert not staging_of(tmp_path / "out").exists()


def test_only_headers_are_read_for_a_plan_and_a_look(bucket: Bucket, tmp_path: Path) -> None:
    address = bucket.put(large_checkpoint(tmp_path / "large", shards=2, shard_mb=2), "large")
    assert dry_run(address).bytes_in > 3_900_000
    assert inspect(address).name == "large"
    assert bucket.sent < 500_000


FAULTS = ["cut", "drop", HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.FORBIDDEN]


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, *FAULTS]), max_size=12))
def test_whatever_the_store_does_the_result_is_whole_or_none(
    bucket: Bucket, source: str, here: Mapping[str, bytes], tmp_path: Path, faults: list[Fault]
) -> None:
    left = list(faults)
    bucket.fault = lambda request: left.pop() if left and is_shard(request) else None
    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(len(faults) + 1):
        try:
            quantize(source, out)
            break
        except W8A8Error:
            assert not out.exists()
    assert folder_bytes(out) == here
    assert not staging_of(out).exists()


def test_an_object_that_is_replaced_meanwhile_is_noticed(
    bucket: Bucket, source: str, tmp_path: Path, llama: Path
) -> None:
    content = (llama / NAME).read_bytes()

    def replaced(request: Request) -> Fault:
        if request.key.endswith(NAME) and sum(1 for r in bucket.requests if r == request) == 3:
            bucket.system.pipe_file(f"{BUCKET}/some/llama/{NAME}", bytes(len(content)))
        return None

    bucket.fault = replaced
    with pytest.raises(SourceChangedError, match=rf"{source}/{NAME}: was replaced meanwhile; run the same command"):
        quantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_over_another_model_at_the_same_address_starts_over(
    bucket: Bucket, source: str, tmp_path: Path, llama: Path
) -> None:
    last = f"model-0000{SHARDS}-of-0000{SHARDS}.safetensors"
    bucket.fault = lambda request: HTTPStatus.FORBIDDEN if request.key.endswith(last) and _begun(bucket, last) else None
    with pytest.raises(StoreError, match="the store refused"):
        quantize(source, tmp_path / "out", workers=1)
    assert finished_shards(tmp_path / "out") > 0
    bucket.fault = lambda _: None
    other = write_checkpoint(tmp_path / "llama", llama_tensors(seed=1), shards=SHARDS)
    (other / "tokenizer.json").write_text("{}")
    notices: list[str] = []
    quantize(bucket.put(other, "some/llama"), tmp_path / "out", notice=notices.append)
    assert any("made from another" in notice for notice in notices)
    quantize(other, tmp_path / "local", hash_source=True)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "local")


def _begun(bucket: Bucket, name: str) -> bool:
    """Whether the header of a file has been read."""
    return sum(1 for request in bucket.requests if request.key.endswith(name)) > 2


def test_what_is_not_there_or_not_allowed_is_said(bucket: Bucket, source: str, tmp_path: Path) -> None:
    for address, error, says in (
        (f"s3://{BUCKET}/none", SourceNotFoundError, "no such bucket, or no such folder in it"),
        ("s3://no-such-bucket/none", SourceNotFoundError, "no such bucket"),
        (f"s3://{BUCKET}/some", NoConfigError, "no config.json here"),
        (f"s3://{BUCKET}/some/../llama", UsageError, "is not the address of a folder"),
        ("simplecache::s3://models/llama", UsageError, "is not the address of a folder"),
        ("nothing://models/llama", UsageError, "there is no nothing://"),
        ("oci://models/llama", MissingExtraError, "oci:// needs a package that is not installed: Install ocifs"),
    ):
        with pytest.raises(error, match=says):
            inspect(address)
    bucket.fault = lambda _: HTTPStatus.FORBIDDEN
    with pytest.raises(StoreError, match=r"the store refused: .*; check the credentials and their rights"):
        inspect(source)
    bucket.system.pipe_file(f"{BUCKET}/pickles/config.json", b"{}")
    bucket.system.pipe_file(f"{BUCKET}/pickles/pytorch_model.bin", b"\x80\x02.")
    bucket.fault = lambda _: None
    with pytest.raises(PickleOnlyError, match="pickles are never opened"):
        inspect(f"s3://{BUCKET}/pickles")


@pytest.mark.parametrize(
    ("protocol", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gs"), ("az", "adlfs", "az")]
)
def test_a_package_that_is_missing_is_named_by_its_extra(
    monkeypatch: pytest.MonkeyPatch, protocol: str, package: str, extra: str
) -> None:
    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{protocol}:// needs a package .*: pip install 'w8a8\[{extra}\]'"):
        inspect(f"{protocol}://bucket/folder")


def test_without_credentials_it_is_said(bucket: Bucket, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreError, match=r"the store refused: .*credentials"):
        inspect(source)


def test_a_result_is_verified_against_its_source_in_the_store(bucket: Bucket, source: str, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out")
    result = verify(tmp_path / "out", source)
    assert result.ok, result.problems
    assert result.checksums == 2 * SHARDS
    other = write_checkpoint(tmp_path / "other", llama_tensors(seed=1), shards=SHARDS)
    assert not verify(tmp_path / "out", bucket.put(other, "other")).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_a_checkpoint_in_the_store_is_converted(bucket: Bucket, llama: Path, tmp_path: Path) -> None:
    quantize(llama, tmp_path / "quark")
    address = bucket.put(tmp_path / "quark", "quark")
    for name in ("compressed-tensors", "bf16"):
        convert(address, tmp_path / name, name)
        convert(tmp_path / "quark", tmp_path / f"{name}-here", name)
        assert folder_bytes(tmp_path / name) == folder_bytes(tmp_path / f"{name}-here")
    with pytest.raises(UsageError, match=rf"^{address}: is quark already"):
        convert(address, tmp_path / "again", "quark")


def test_calibration_needs_files_here_and_says_so(source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"^{source}: this command reads files here; copy the folder first"):
        quantize(source, tmp_path / "out", Options(recipe="smooth"))


def test_keys_that_are_no_files_of_the_folder_are_left_alone(
    bucket: Bucket, source: str, here: Mapping[str, bytes], tmp_path: Path
) -> None:
    for key in ("../out.json", "/abs.json", "a//b.json", "..", ".", "a/../../b.json", "back\\slash.json", ""):
        bucket.system.call_s3("put_object", Bucket=BUCKET, Key=f"some/llama/{key}", Body=b"{}")
    quantize(source, tmp_path / "deep" / "out")
    assert folder_bytes(tmp_path / "deep" / "out") == here
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["deep", "out"]


def test_a_listing_is_bounded(bucket: Bucket, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_ENTRIES", SHARDS)
    with pytest.raises(StoreError, match=f"holds more than {SHARDS} objects; name the model's folder"):
        inspect(source)


def test_a_folder_without_config_is_not_listed(bucket: Bucket, source: str) -> None:
    with pytest.raises(NoConfigError):
        inspect(f"s3://{BUCKET}")
    listings = [request for request in bucket.requests if "list-type" in request.query]
    assert all("max-keys=1" in request.query for request in listings), listings


def test_no_more_is_held_than_the_budget_and_scales_elsewhere_are_there(bucket: Bucket, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {
        name: ("F8_E4M3", rng.integers(0, 127, (128, 256), np.uint8)),
        f"{name}_scale_inv": ("F32", rng.random((1, 2), np.float32) + 0.5),
    }
    folder = write_checkpoint(tmp_path / "fp8", tensors, shards=2)
    quantize(bucket.put(folder, "fp8"), tmp_path / "out", disk_budget=1, workers=1)
    quantize(folder, tmp_path / "whole")
    found, expected = folder_bytes(tmp_path / "out"), folder_bytes(tmp_path / "whole")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {"w8a8.json"}  # it has checksums of the source


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on(bucket: Bucket, tmp_path: Path) -> None:
    folder = large_checkpoint(tmp_path / "large", shards=6, shard_mb=2)
    address, out = bucket.put(folder, "large"), tmp_path / "out"
    process = subprocess.Popen([*W8A8, "quantize", address, str(out), "--workers", "1"],
                               env={**os.environ, **bucket.env}, stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: finished_shards(out) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    done = finished_shards(out)
    assert not out.exists()
    assert done >= 2
    bucket.requests.clear()
    run = cli("quantize", address, str(out), "--workers", "1", env=bucket.env)
    assert run.returncode == 0, run.stderr
    assert f"resuming: {done} of 6" in run.stderr
    quantize(folder, tmp_path / "whole", hash_source=True)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")
    assert json.loads((out / "w8a8.json").read_text())["source"]["sha256"]


def test_who_waits_for_bytes_can_stop(bucket: Bucket, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, gate = stores.StoreFolder.find(source), threading.Event()

    def hold(request: Request) -> Fault:
        if request.method == "GET":
            gate.wait(60)
        return None

    bucket.fault = hold
    with monkeypatch.context() as patch:
        patch.setattr(stores, "RANGE_SECONDS", 0.0)
        with pytest.raises(NotDeliveredError, match="did not come within"):
            [*folder.body(folder.files[NAME], 0)]
    pieces = folder.body(folder.files[NAME], 0)
    assert next(pieces) == b""
    gate.set()
    assert b"".join(pieces) == bucket.system.cat_file(f"{BUCKET}/some/llama/{NAME}")


def test_a_listing_that_does_not_end_is_given_up(bucket: Bucket, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate = stores.Store.at(source), threading.Event()
    bucket.fault = lambda request: (gate.wait(60), None)[1] if "list-type" in request.query else None
    monkeypatch.setattr(stores, "LISTING_SECONDS", 0.5)
    with pytest.raises(StoreError, match="its listing did not end"):
        store.listing()
    gate.set()
