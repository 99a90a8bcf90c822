"""`w8a8 status`: how far a run is, while it runs, when it was interrupted, and behind its end."""

import json
import signal
from pathlib import Path

import pytest

from tests.command import cli
from tests.execute.runs import finish, finished_shards, large_checkpoint, signal_after_a_shard, start, wait_for
from w8a8.errors import SourceNotFoundError
from w8a8.execute.status import status

SHARDS = 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return large_checkpoint(tmp_path / "source", shards=SHARDS, shard_mb=8)


def test_a_run_is_seen_while_it_runs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out)
    wait_for(lambda: finished_shards(out) > 0, process)
    process.send_signal(signal.SIGSTOP)
    try:
        found = status(out)
        assert found.state == "running"
        assert 0 < found.shards_done == SHARDS - len(found.remaining)
        assert found.bytes == sum(file.stat().st_size for file in source.glob("*.safetensors"))
    finally:
        process.send_signal(signal.SIGCONT)
    assert finish(process)[0] == 0
    assert status(out).state == "whole"


def test_an_interrupted_run_says_what_remains(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finish(signal_after_a_shard(signal.SIGINT, source, out))
    run = cli("status", out, "--json")
    found = json.loads(run.stdout)
    assert run.returncode == 0
    assert found["state"] == "interrupted"
    assert found["shards_done"] == finished_shards(out)
    assert {*found["remaining"]} < {file.name for file in source.glob("*.safetensors")}
    assert len(found["remaining"]) == SHARDS - found["shards_done"]
    shown = cli("status", out).stdout
    assert "interrupted; the same command goes on" in shown
    assert f"quark, rtn: {found['shards_done']} of {SHARDS} shards done" in shown


def test_where_nothing_is_made_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError, match="no such folder, and no unfinished run of it"):
        status(tmp_path / "out")
