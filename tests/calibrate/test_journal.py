"""The journal of a pass: what is finished is gone on from, and nothing else is left."""

from pathlib import Path

from w8a8.calibrate.journal import LayerJournal
from w8a8.recipes.layer import Gain

JOB = {"recipe": "smooth", "sources": {"model.safetensors": [12, 34]}}
GAINS = (Gain("q/k/v", 0.5, 0.25, "smooth"), Gain("down", 0.125, 0.125, "rtn"))
STATES = b"states"


def pass_of_one_layer(folder: Path) -> LayerJournal:
    journal = LayerJournal(folder, JOB, len(STATES))
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
    found = LayerJournal(tmp_path / "first", JOB, len(STATES))
    assert found.begun
    assert found.gains == [GAINS]
    assert [path.read_bytes() for path in found.layers()] == [b"layer"]
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["journal.jsonl", "layer-00000.safetensors", "states-00001.bin"]


def test_another_job_starts_over(tmp_path: Path) -> None:
    pass_of_one_layer(tmp_path)
    found = LayerJournal(tmp_path, {**JOB, "recipe": "auto"}, len(STATES))
    assert not found.begun
    assert found.gains == []
    assert [*tmp_path.iterdir()] == []


def test_states_that_are_not_whole_start_over(tmp_path: Path) -> None:
    journal = pass_of_one_layer(tmp_path)
    journal.states(1).write_bytes(STATES[:3])
    assert not LayerJournal(tmp_path, JOB, len(STATES)).begun
    assert [*tmp_path.iterdir()] == []


def test_a_journal_with_other_lines_starts_over(tmp_path: Path) -> None:
    journal = pass_of_one_layer(tmp_path)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('\n{"name": "model.safetensors"}')
    journal.states(2).write_bytes(STATES)
    assert not LayerJournal(tmp_path, JOB, len(STATES)).begun
