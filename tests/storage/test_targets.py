"""Results that go to an object store while they are made: a real S3 server, which fails now and then."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoints import folder_bytes
from tests.command import cli
from tests.execute.runs import large_checkpoint, staging_of
from tests.storage.buckets import BUCKET, Bucket, Fault, Request
from tests.storage.conftest import SHARDS
from w8a8 import Options, convert, quantize
from w8a8.errors import StoreError, TargetBusyError, TargetExistsError, UnwritableError, UsageError, W8A8Error
from w8a8.execute.shard import ShardRecord
from w8a8.execute.staging import Staging
from w8a8.execute.target import CLAIM, StoreTarget
from w8a8.storage import upload

OUT = f"s3://{BUCKET}/results/llama-W8A8"
PREFIX = "results/llama-W8A8"


@pytest.fixture(scope="module")
def expected(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The same result in a folder here."""
    out = tmp_path_factory.mktemp("result") / "out"
    quantize(llama, out)
    return folder_bytes(out)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which all runs are."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def puts(bucket: Bucket) -> list[str]:
    """The objects that were sent, in order, by parts or whole."""
    keys = [r.key for r in bucket.requests if r.method == "PUT" and r.key and "partNumber" not in r.query]
    return [key.removeprefix(f"{PREFIX}/") for key in keys]


def test_the_result_is_that_of_a_folder_here_and_shows_last(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes], home: Path
) -> None:
    result = quantize(llama, OUT)
    assert bucket.read(PREFIX) == expected
    assert result.address == OUT
    sent = puts(bucket)
    assert sent[0] == CLAIM
    assert sent[-2:] == ["model.safetensors.index.json", "config.json"]
    assert {*sent[1 : SHARDS + 1]} == {name for name in expected if name.endswith(".safetensors")}
    assert list(home.iterdir()) == []


def test_from_a_store_to_a_store(bucket: Bucket, llama: Path, home: Path) -> None:
    address = bucket.put(llama, "llama")
    run = cli("quantize", address, OUT, "--json", env=bucket.env)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["out"] == OUT
    quantize(llama, home / "whole", hash_source=True)
    assert bucket.read(PREFIX) == folder_bytes(home / "whole")
    with pytest.raises(UsageError, match="may not contain each other"):
        quantize(address, f"{address}/out", overwrite=True)
    with pytest.raises(UsageError, match="may not contain each other"):
        quantize(address, address.replace("s3:", "s3a:"), overwrite=True)


@pytest.mark.parametrize("protocol", ["file", "local"])
def test_a_folder_here_is_no_store(llama: Path, protocol: str) -> None:
    with pytest.raises(UsageError, match=f"lies here; give its path, without {protocol}://"):
        quantize(llama, f"{protocol}://{llama}", overwrite=True)
    with pytest.raises(UsageError, match="lies here"):
        quantize(f"{protocol}://{llama}", "out")
    assert len([*llama.glob("*.safetensors")]) == SHARDS


def test_a_conversion_goes_to_a_store(bucket: Bucket, llama: Path, home: Path) -> None:
    quantize(llama, home / "quark")
    address = bucket.put(home / "quark", "quark")
    assert convert(address, OUT, "compressed-tensors").address == OUT
    convert(home / "quark", home / "whole", "compressed-tensors")
    assert bucket.read(PREFIX) == folder_bytes(home / "whole")


def test_large_files_go_by_parts_and_few_shards_are_here_at_once(
    bucket: Bucket, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = large_checkpoint(home / "large", shards=6, shard_mb=24)
    monkeypatch.setattr(upload, "_OPTIONS", {"s3": {"chunksize": 5 << 20, "max_concurrency": 2}})
    here: list[int] = []

    def look(_: Request) -> Fault:
        files = (home / ".out.w8a8" / "out").glob("*.safetensors")
        here.append(sum(path.stat().st_blocks * 512 > 10_000_000 for path in files))
        return None

    bucket.fault = look
    quantize(folder, f"s3://{BUCKET}/out", workers=1)
    assert any("partNumber=2" in request.query for request in bucket.requests)
    assert 1 <= max(here) <= 3
    quantize(folder, home / "whole")
    assert bucket.read("out") == folder_bytes(home / "whole")
    assert bucket.unfinished() == []


def test_what_is_there_is_not_touched_unless_it_is_to_be_replaced(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes]
) -> None:
    quantize(llama, OUT, workers=1)
    bucket.system.pipe_file(f"{BUCKET}/{PREFIX}/old/notes.txt", b"old")
    before = bucket.read(PREFIX)
    with pytest.raises(TargetExistsError, match=f"{OUT}: exists already; --overwrite replaces it"):
        quantize(llama, OUT)
    assert bucket.read(PREFIX) == before
    quantize(llama, OUT, overwrite=True)
    assert bucket.read(PREFIX) == expected
    bucket.system.pipe_file(f"{BUCKET}/things/a.txt", b"a")
    with pytest.raises(UsageError, match="is not a checkpoint"):
        quantize(llama, f"s3://{BUCKET}/things", overwrite=True)
    assert bucket.read("things") == {"a.txt": b"a"}


def test_of_two_runs_for_one_address_the_second_is_refused(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.fault = lambda request: HTTPStatus.FORBIDDEN if "00003" in request.key else None
    with pytest.raises(StoreError, match="the store refused"):
        quantize(llama, OUT)
    bucket.fault = lambda _: None
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    with pytest.raises(TargetBusyError, match="another run is writing it, or did, from another folder"):
        quantize(llama, OUT)
    quantize(llama, OUT, overwrite=True)
    assert bucket.read(PREFIX) == expected
    monkeypatch.chdir(home)
    with pytest.raises(TargetExistsError):
        quantize(llama, OUT)


def test_a_run_whose_folder_was_taken_meanwhile_shows_nothing(bucket: Bucket, llama: Path) -> None:
    def taken(request: Request) -> Fault:
        if "00004" in request.key and request.method == "PUT":
            bucket.system.pipe_file(f"{BUCKET}/{PREFIX}/{CLAIM}", b"another")
        return None

    bucket.fault = taken
    with pytest.raises(TargetBusyError, match="another run has taken this folder meanwhile"):
        quantize(llama, OUT)
    assert "config.json" not in bucket.read(PREFIX)


def test_a_run_whose_folder_was_taken_removes_nothing(bucket: Bucket, llama: Path) -> None:
    target = StoreTarget.claim(OUT, overwrite=False)
    others = {CLAIM: b"another", "model.safetensors": b"theirs"}
    for name, content in others.items():
        bucket.system.pipe_file(f"{BUCKET}/{PREFIX}/{name}", content)
    with pytest.raises(TargetBusyError, match="another run has taken this folder meanwhile"):
        target.send(llama / "config.json", ShardRecord("config.json", 1, "", ""), lambda: False)
    assert bucket.read(PREFIX) == others


def test_a_shard_that_was_changed_in_the_store_is_sent_again(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes]
) -> None:
    name = f"model-00001-of-0000{SHARDS}.safetensors"

    def changed(request: Request) -> Fault:
        if request.key.endswith("w8a8.json"):
            bucket.system.pipe_file(f"{BUCKET}/{PREFIX}/{name}", bytes(len(expected[name])))
            return HTTPStatus.FORBIDDEN
        return None

    bucket.fault = changed
    with pytest.raises(StoreError):
        quantize(llama, OUT)
    bucket.fault = lambda _: None
    bucket.requests.clear()
    notices: list[str] = []
    quantize(llama, OUT, notice=notices.append)
    assert [key for key in puts(bucket) if key.endswith(".safetensors")] == [name]
    assert bucket.read(PREFIX) == expected
    assert any(f"resuming: {SHARDS - 1} of {SHARDS}" in notice for notice in notices), notices


FAULTS = ["cut", "drop", HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.FORBIDDEN]


@pytest.mark.slow
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([None, None, *FAULTS]), max_size=12))
def test_whatever_the_store_does_it_shows_the_whole_or_nothing(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes], home: Path, faults: list[Fault]
) -> None:
    if bucket.system.exists(f"{BUCKET}/{PREFIX}"):
        bucket.system.rm(f"{BUCKET}/{PREFIX}", recursive=True)
    left = list(faults)
    bucket.fault = lambda _: left.pop() if left else None
    for _ in range(len(faults) + 1):
        try:
            quantize(llama, OUT)
            break
        except TargetExistsError:  # the last answer of the run before was lost
            break
        except W8A8Error:
            shown = bucket.read(PREFIX)
            assert "config.json" not in shown or expected.items() <= shown.items()
    bucket.fault = lambda _: None
    found = bucket.read(PREFIX)
    found.pop(CLAIM, None)
    assert found == expected
    assert bucket.unfinished() == []
    for path in home.iterdir():
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


SMALL_PARTS = """
from w8a8.cli import main
from w8a8.storage import upload
upload._OPTIONS["s3"].update(chunksize=5 << 20)
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_ended_while_it_sent_goes_on(bucket: Bucket, home: Path, number: signal.Signals) -> None:
    folder = large_checkpoint(home / "large", shards=4, shard_mb=24)
    quantize(folder, home / "whole")
    parts: list[Request] = []
    process: subprocess.Popen[str] | None = None

    def end(request: Request) -> Fault:
        if "partNumber=2" in request.query:
            parts.append(request)
            if len(parts) == 3 and process:
                process.send_signal(number)
        return None

    bucket.fault = end
    command = [sys.executable, "-c", SMALL_PARTS, "quantize", str(folder), f"s3://{BUCKET}/out", "--workers=1"]
    process = subprocess.Popen(command, env={**os.environ, **bucket.env}, stderr=subprocess.PIPE, text=True)
    process.communicate(timeout=60)
    assert "config.json" not in bucket.read("out")
    lines = (staging_of(home / "out") / "journal.jsonl").read_text().splitlines()
    noted = {f"out/{line['name']}" for line in map(json.loads, lines[1:]) if line.get("receipt")}
    assert noted
    if number == signal.SIGKILL:
        assert bucket.unfinished()
    status = cli("status", f"s3://{BUCKET}/out", "--json")
    assert json.loads(status.stdout)["state"] == "interrupted"
    bucket.requests.clear()
    run = cli("quantize", folder, f"s3://{BUCKET}/out", "--workers", "1", env=bucket.env)
    assert run.returncode == 0, run.stderr
    assert bucket.read("out") == folder_bytes(home / "whole")
    assert not noted & {request.key for request in bucket.requests if request.method in ("PUT", "POST")}
    assert bucket.unfinished() == []
    assert not staging_of(home / "out").exists()


def test_parts_that_a_kill_has_left_are_aborted(bucket: Bucket, llama: Path, expected: Mapping[str, bytes]) -> None:
    for key in (f"{PREFIX}/model-00001-of-0000{SHARDS}.safetensors", "other/model.safetensors"):
        bucket.system.call_s3("create_multipart_upload", Bucket=BUCKET, Key=key)
    quantize(llama, OUT)
    assert bucket.unfinished() == ["other/model.safetensors"]
    assert bucket.read(PREFIX) == expected


@pytest.mark.parametrize("status", [HTTPStatus.FORBIDDEN, HTTPStatus.INTERNAL_SERVER_ERROR])
def test_where_parts_cannot_be_listed_they_stay(
    bucket: Bucket, llama: Path, expected: Mapping[str, bytes], status: HTTPStatus
) -> None:
    bucket.fault = lambda request: status if request.query.startswith("uploads") and request.method == "GET" else None
    quantize(llama, OUT)
    assert bucket.read(PREFIX) == expected


def test_what_cannot_be_written_is_said_at_once(bucket: Bucket, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnwritableError, match="there is no such bucket; make it first"):
        quantize(llama, "s3://no-such-bucket/out")
    with pytest.raises(UsageError, match="hf://org/name"):
        quantize(llama, "hf://org/name")
    bucket.fault = lambda request: HTTPStatus.FORBIDDEN if request.method == "PUT" else None
    with pytest.raises(StoreError, match=r"the store refused: .*; check the credentials and their rights"):
        quantize(llama, OUT)
    assert bucket.read(PREFIX) == {}


@pytest.mark.parametrize("place", [(StoreTarget, "_forget"), (Staging, "drop")])
def test_a_run_that_ended_behind_its_last_step_ends_well_and_sends_nothing(
    bucket: Bucket,
    llama: Path,
    expected: Mapping[str, bytes],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[type, str],
) -> None:
    def end(_: object) -> None:
        raise KeyboardInterrupt

    def ended() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(*place, end)
            with pytest.raises(KeyboardInterrupt):
                quantize(llama, OUT, overwrite=True)

    ended()
    with pytest.raises(TargetExistsError, match="exists already"):
        quantize(llama, OUT, Options(format="compressed-tensors"))
    ended()
    assert bucket.read(PREFIX) == expected
    assert staging_of(home / "llama-W8A8").exists()
    bucket.requests.clear()
    (home / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(home / "elsewhere")
        with pytest.raises(TargetExistsError):
            quantize(llama, OUT)
    assert quantize(llama, OUT).resumed == SHARDS
    assert {request.method for request in bucket.requests} <= {"GET", "HEAD"}
    assert [entry.name for entry in home.iterdir()] == ["elsewhere"]
    with pytest.raises(TargetExistsError, match="exists already; --overwrite replaces it"):
        quantize(llama, OUT)
