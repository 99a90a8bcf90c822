"""Data sets: read by the library itself, from a folder; and what is said where they cannot be had."""

import json
import sys
from pathlib import Path

import pytest

from w8a8.errors import HubError, MissingExtraError
from w8a8.texts import datasets
from w8a8.texts.samples import load

ROWS = [{"text": f"number {i}"} for i in range(5)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(("limit", "count"), [(None, 5), (3, 3), (9, 5)])
def test_all_records_or_the_first_of_them(tmp_path: Path, limit: int | None, count: int) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    assert datasets.load(str(folder), None, "train", limit=limit, otherwise="") == ROWS[:count]


def test_a_data_set_that_cannot_be_had_says_what_to_do_instead() -> None:
    with pytest.raises(HubError, match=r"^org/none: the Hub could not deliver this data set \(.*\); take a file$"):
        datasets.load("org/none", "main", "train", otherwise="take a file")
    with pytest.raises(HubError, match=r"^org/none: .* no file of this name"):
        load("org/none:main")


def test_without_the_library_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"^org/none: .* pip install 'w8a8\[eval\]'; take a file$"):
        datasets.load("org/none", None, "train", otherwise="take a file")
