"""The journal of a pass: what is finished is gone on from, and nothing else is left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from w8a8.calibrate import costs as costs_module
from w8a8.calibrate.journal import Job, LayerJournal
from w8a8.checkpoint.stream import Identity
from w8a8.recipes.costs import Cost
from w8a8.recipes.layer import Gain

FILE = Identity(inode=1, size=12, mtime_ns=34, ctime_ns=56)
JOB = Job("1", "smooth", "hash", {"model.safetensors": FILE}, "cpu")
GAINS = (Gain("q/k/v", 0.5, 0.25, "smooth"), Gain("down", 0.125, 0.125, "rtn"))
STATES = b"states"


def pass_of_one_layer(folder: Path) -> LayerJournal:
    journal = LayerJournal(folder, JOB)
    journal.states(0).write_bytes(STATES)
    journal.begin()
    journal.store(b"layer")
    journal.states(1).write_bytes(STATES)
    journal.record(GAINS)
    return journal


def test_what_is_finished_is_found_again_and_what_is_not_is_removed(tmp_path: Path) -> None:
    pass_of_one_layer(tmp_path / "first")
    for unfinished in (".layer-00001.safetensors.1.tmp", "layer-00001.safetensors", "states-00002.bin"):
        (tmp_path / "first" / unfinished).write_bytes(b"half")
    found = LayerJournal(tmp_path / "first", JOB)
    assert found.begun
    assert found.gains == [GAINS]
    assert [path.read_bytes() for path in found.layers()] == [b"layer"]
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["journal.jsonl", "layer-00000.safetensors", "states-00001.bin"]


def test_another_job_starts_over(tmp_path: Path) -> None:
    pass_of_one_layer(tmp_path)
    found = LayerJournal(tmp_path, replace(JOB, recipe="auto"))
    assert not found.begun
    assert found.gains == []
    assert [*tmp_path.iterdir()] == []


def test_states_that_are_not_whole_start_over(tmp_path: Path) -> None:
    journal = pass_of_one_layer(tmp_path)
    journal.states(1).write_bytes(STATES[:3])
    assert not LayerJournal(tmp_path, JOB).begun
    assert [*tmp_path.iterdir()] == []


def test_a_journal_with_other_lines_starts_over(tmp_path: Path) -> None:
    journal = pass_of_one_layer(tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('\n{"name": "model.safetensors"}')
    journal.states(2).write_bytes(STATES)
    assert not LayerJournal(tmp_path, JOB).begun


@pytest.mark.parametrize("name", ["layer-00000.safetensors", "states-00001.bin"])
def test_a_finished_file_that_was_damaged_starts_over_and_says_so(tmp_path: Path, name: str) -> None:
    pass_of_one_layer(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[0] ^= 1
    (tmp_path / name).write_bytes(data)
    found = LayerJournal(tmp_path, JOB)
    assert not found.begun
    assert found.lost == f"{name} is not what was written"
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("line", ["[1]", "[" * 100_000, '{"layers": 2, "gains": [1]}', "null"])
def test_a_damaged_journal_starts_over_and_says_so(tmp_path: Path, line: str) -> None:
    pass_of_one_layer(tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(f"{line}\n")
    found = LayerJournal(tmp_path, JOB)
    assert not found.begun
    assert found.lost == "line 4 is not what was written"


def test_a_doubled_line_says_nothing_new(tmp_path: Path) -> None:
    pass_of_one_layer(tmp_path)
    journal = tmp_path / "journal.jsonl"
    journal.write_text(f"{journal.read_text()}{journal.read_text().splitlines()[-1]}\n")
    assert LayerJournal(tmp_path, JOB).gains == [GAINS]


def test_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    pass_of_one_layer(elsewhere)
    (tmp_path / "first").symlink_to(elsewhere)
    assert not LayerJournal(tmp_path / "first", replace(JOB, recipe="auto")).begun
    assert len([*elsewhere.iterdir()]) == 3


def test_damaged_costs_are_measured_again(tmp_path: Path) -> None:
    path, costs = tmp_path / "costs.safetensors", [{"q_proj": Cost(torch.ones(2), torch.ones(3))}]
    costs_module._store(costs, path, JOB)
    assert costs_module._load(path, [["q_proj"]], JOB) is not None
    assert costs_module._load(path, [["q_proj"]], replace(JOB, recipe="auto")) is None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert costs_module._load(path, [["q_proj"]], JOB) is None
