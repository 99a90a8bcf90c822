"""`w8a8 bench linear`, on a tiny layer: that its table is whole and its figures follow from each other."""

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from w8a8.bench.linear import LinearResult, LinearRow, bench, show

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result() -> LinearResult:
    shapes, heads = ((64, 128), (128, 64)), ((192, 64),)
    return bench(runs=3, shapes=shapes, tokens=(1, 9), heads=heads, head_tokens=(1,), spread=1 << 16)


def test_there_is_a_row_for_each_shape_and_number_of_tokens(result: LinearResult) -> None:
    assert [(r.outputs, r.inputs, r.tokens, r.kind) for r in result.rows] == [
        (64, 128, 1, "W8A8"),
        (64, 128, 9, "W8A8"),
        (128, 64, 1, "W8A8"),
        (128, 64, 9, "W8A8"),
        (192, 64, 1, "BF16"),
    ]
    for row in result.rows:
        for turns in (row.ours_ms, row.bf16_ms, row.f32_ms, row.read_gb_s):
            assert len(turns) == 3
            assert min(turns) > 0


def test_its_json_holds_every_turn_and_the_medians() -> None:
    row = LinearRow(1000, 2000, 4, (3.0, 2.0, 1.0), (8.0, 4.0, 2.0), (9.0, 5.0, 3.0), (10.0, 4.0, 1.0))
    values = json.loads(json.dumps(LinearResult(2, (row,)).to_dict()))
    assert values["threads"] == 2
    found = values["rows"][0]
    assert found["ours_ms"] == [3.0, 2.0, 1.0]
    assert (found["ours_median_ms"], found["bf16_median_ms"], found["speedup"]) == (2.0, 4.0, 2.0)
    assert (found["f32_median_ms"], found["better"]) == (5.0, "BF16")
    assert (found["gb_s"], found["read_median_gb_s"], found["share_of_read"]) == (1.0, 4.0, 0.25)
    assert (found["us_per_token"], found["tera_ops"]) == (500.0, 0.008)
    assert replace(row, kind="BF16").to_dict()["gb_s"] == 2.0  # two bytes a weight


def test_its_table_shows_every_row(result: LinearResult) -> None:
    text = StringIO()
    show(result, Console(file=text, width=120).print)
    header, titles, *rows, last = text.getvalue().splitlines()
    assert "medians of 3" in header
    assert "better of torch" in last
    assert titles.split()[:2] == ["out", "x"]
    assert [row.split()[:5] for row in rows] == [
        ["64", "x", "128", "1", "W8A8"],
        ["64", "x", "128", "9", "W8A8"],
        ["128", "x", "64", "1", "W8A8"],
        ["128", "x", "64", "9", "W8A8"],
        ["192", "x", "64", "1", "BF16"],
    ]


def test_its_table_fits_a_narrow_terminal() -> None:
    slow = LinearRow(21504, 5376, 512, (588.91,), (7916.42,), (1013.16,), (17.6,))
    text = StringIO()
    show(LinearResult(2, (slow,)), Console(file=text, width=80).print)
    row = text.getvalue().splitlines()[2].split()
    assert row[:7] == ["21504", "x", "5376", "512", "W8A8", "588.91", "7916.42"]
    assert row[7:10] == ["1013.16", "1.72", "F32"]
