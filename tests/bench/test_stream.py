"""`w8a8 bench stream`: a model from a server on this machine, at a set bandwidth."""

import json
from pathlib import Path

import pytest

from tests.command import cli


@pytest.mark.slow
def test_all_contenders_run_and_the_bandwidth_holds(tmp_path: Path) -> None:
    run = cli("bench", "stream", "--gib", "0.1", "--mbps", "900", "--runs", "1", "--dir", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    seconds = {row["name"]: row["seconds"] for row in found["rows"]}
    assert {*seconds} == {"download alone", "quantize a folder", "quantize from the Hub"}
    assert seconds["download alone"] > found["bytes"] / 900e6
    assert seconds["quantize from the Hub"] > found["bytes"] / 900e6
    assert 0 < found["peak_disk"] <= found["bytes"] + 1_000_000
    assert not [entry.name for entry in tmp_path.iterdir() if entry.name.startswith("tmp")]
