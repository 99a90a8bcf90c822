"""`w8a8 bench quantize`, on a single layer: that the table is there and sane. No timing is asserted."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich import markup

from tests.command import cli
from w8a8.bench.model import LAYER_BYTES
from w8a8.bench.quantize import BenchResult, Row, show

pytestmark = pytest.mark.slow

ROWS = [
    "cp -r",
    "cp -r, synced",
    "w8a8 quantize",
    "w8a8 verify",
    "w8a8 quantize, first ever (cold JIT)",
    "SHA-256 of the source alone",
]


def bench(folder: Path) -> tuple[dict[str, Any], str]:
    """Run the smallest bench, one run of each contender; return its JSON result and its notices."""
    command = ["bench", "quantize", "--gib", "0.1", "--runs", "1", "--dir", str(folder), "--json"]
    done = cli(*command, check=True, timeout=None)
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[dict[str, Any], str]:
    return bench(folder)


def test_the_table_has_a_sane_row_for_each_contender(first: tuple[dict[str, Any], str]) -> None:
    result, _ = first
    assert [row["name"] for row in result["rows"]] == ROWS
    assert LAYER_BYTES < result["bytes"] < LAYER_BYTES + (1 << 20)
    assert result["cores"] >= 1
    assert result["failed"] == {}
    for row in result["rows"]:
        assert len(row["all_seconds"]) == 1
        assert row["seconds"] == row["all_seconds"][0] > 0
        assert row["ratio_to_cp"] == row["seconds"] / result["rows"][0]["seconds"]


def test_a_contenders_peak_memory_is_its_own_and_not_the_benchs(first: tuple[dict[str, Any], str]) -> None:
    peak = {row["name"]: row["peak_mib"] for row in first[0]["rows"]}
    assert 0 < peak["cp -r"] < 30 < min(peak["w8a8 quantize"], peak["w8a8 verify"])


def test_a_second_run_makes_no_new_source_and_nothing_else_is_left_behind(
    folder: Path, first: tuple[dict[str, Any], str]
) -> None:
    assert "making 1 layers" in first[1]
    (source,) = folder.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in source.iterdir()}
    again, said = bench(folder)
    assert "making" not in said
    assert [row["name"] for row in again["rows"]] == ROWS
    assert list(folder.iterdir()) == [source]
    assert {file.name: file.stat().st_mtime_ns for file in source.iterdir()} == before


def test_the_table_compares_with_cp_and_names_the_peers_that_failed() -> None:
    rows = (Row("cp -r", (4.0, 2.0, 3.0), 8.0), Row("w8a8 quantize", (1.0, 1.5, 2.0), 204.4))
    said: list[Any] = []
    show(BenchResult(2**30, 2, rows, {"AMD Quark": "no room for [torch]"}), said.append)
    assert said[0] == "1.00 GiB, 2 cores, medians of 3"
    cells = [list(column.cells) for column in said[1].columns]
    assert cells == [
        ["3.00", "1.50"],
        ["2.00-4.00", "1.00-2.00"],
        ["1.00", "0.50"],
        ["8", "204"],
        ["cp -r", "w8a8 quantize"],
    ]
    assert markup.render(said[2]).plain == "AMD Quark did not run: no room for [torch]"


@pytest.mark.slow
def test_experts_stand_beside_a_dense_model(folder: Path) -> None:
    done = cli("bench", "quantize", "--experts", "--gib", "0.1", "--runs", "1", "--dir", folder, "--json", check=True)
    result = json.loads(done.stdout)
    assert [row["ratio_to_dense"] == 1 for row in result["rows"]] == [True, False, False, False]
    assert all(result["bytes"][row["name"]] > LAYER_BYTES and row["peak_mib"] > 30 for row in result["rows"])
