"""`w8a8 bench quality`, on a small Gemma 4: that the table is there and sane. Peers need environments of gigabytes."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import cli
from w8a8.bench.quality import ARITHMETIC, EXAMPLES, OURS, QualityResult, Row, Score, show


@pytest.fixture(scope="module")
def result(gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quality")
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(EXAMPLES)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["bench", "quality", str(gemma4), "--gsm8k", str(folder), "--tokens", "200", "--samples", "4"]
    command += ["--dir", str(folder / "work"), "--json", "--quiet"]
    done = cli(*command, check=True, timeout=None)
    assert not [*(folder / "work").glob("*out*")]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_recipe_is_measured_on_both_kinds_of_text(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["rows"]] == [ARITHMETIC, *OURS]
    assert result["tokens"] == {"GSM8K": 200, "prose": 200}
    for row in result["rows"]:
        for score in row["scores"].values():
            assert 0 < score["mean"] <= score["p99"]
            assert 0 < score["top1"] <= 1


def test_only_what_stays_in_bf16_makes_the_result_larger(result: dict[str, Any]) -> None:
    sizes = [row["nbytes"] for row in result["rows"]]
    assert max(sizes[1:5]) - min(sizes[1:5]) < 10_000  # headers
    assert sizes[0] > sizes[5] > sizes[1]


def test_the_table_compares_with_rounding_to_nearest() -> None:
    rows = [Row("w8a8 rtn", 1, 10**6, {"prose": Score(0.02, 0.1, 0.9)})]
    rows += [Row("other", 2, 10**6, {"prose": Score(0.005, 0.05, 0.975)})]
    said: list[Any] = []
    show(QualityResult("model", {"prose": 100}, tuple(rows), {"peer": "no room"}), said.append)
    cells = [list(column.cells) for column in said[1].columns]
    assert cells[1:5] == [["0.02000", "0.00500"], ["1.000", "0.250"], ["0.100", "0.050"], ["90.0%", "97.5%"]]
    assert said[2] == "peer did not run: no room"
