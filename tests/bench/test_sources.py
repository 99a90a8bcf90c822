"""`w8a8 bench sources`, on small weights: that its table is whole, and every decoder equals its reference."""

import json
from io import StringIO

import pytest
from rich.console import Console

from w8a8.bench.sources import SourceResult, SourceRow, bench, show


@pytest.fixture(scope="module")
def result() -> SourceResult:
    return bench(runs=2, size=256)


def test_every_spelling_is_timed_against_its_reference(result: SourceResult) -> None:
    references = {row.spelling: row.reference for row in result.rows}
    assert references == {
        "FP8, blocks of 128": "transformers",
        "FP8, rows": "compressed-tensors",
        "INT8, rows": "compressed-tensors",
        "MXFP4, as transformers": "transformers",
        "MXFP4, rows": "compressed-tensors",
        "NVFP4": "compressed-tensors",
        "INT4, groups of 128": "compressed-tensors",
        "GPTQ INT4": "",
        "AWQ INT4": "",
    }
    for row in result.rows:
        assert len(row.seconds) == 2
        assert len(row.reference_seconds) == (2 if row.reference else 0)


def test_its_json_holds_every_turn_and_the_medians() -> None:
    row = SourceRow("FP8", 10**9, (1.0, 0.5, 0.25), "transformers", (4.0, 2.0, 1.0))
    found = json.loads(json.dumps(SourceResult(4096, (row,)).to_dict()))["rows"][0]
    assert (found["gb_s"], found["reference_gb_s"], found["ratio"]) == (2.0, 0.5, 4.0)


def test_its_table_shows_every_row(result: SourceResult) -> None:
    text = StringIO()
    show(result, Console(file=text, width=120).print)
    assert "medians of 2" in text.getvalue()
    assert all(row.spelling in text.getvalue() for row in result.rows)
