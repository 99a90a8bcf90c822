"""`w8a8 bench quality`, on a small Gemma 4: that the table is there and sane. Peers need environments of gigabytes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.command import cli
from w8a8.bench import quality
from w8a8.bench.quality import ARITHMETIC, EXAMPLES, OURS, QualityResult, Row, Score, show
from w8a8.texts import samples


@pytest.fixture(scope="module")
def result(gemma4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("quality")
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(EXAMPLES)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["bench", "quality", str(gemma4), "--gsm8k", str(folder), "--tokens", "200", "--samples", "4"]
    shutil.copyfile(quality.__file__, folder / "program.py")
    command += ["--other", str(folder / "program.py"), "--dir", str(folder / "work"), "--json", "--quiet"]
    done = cli(*command, check=True, timeout=None)
    assert not [*(folder / "work").glob("*out*")]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_recipe_is_measured_on_every_kind_of_text(result: dict[str, Any]) -> None:
    assert [row["name"] for row in result["rows"]] == [ARITHMETIC, *(name for name in OURS if "rotate" not in name)]
    assert "not known to stay what they are" in result["failed"].pop("w8a8 rotate+smooth+gptq")
    assert not result["failed"]
    assert result["tokens"] == {"GSM8K": 200, "prose": 200, "program.py": 200}
    for row in result["rows"]:
        assert row["scores"].keys() == result["tokens"].keys()
        for score in row["scores"].values():
            assert 0 < score["mean"] <= score["p99"]
            assert 0 < score["top1"] <= 1


def test_the_built_in_texts_are_of_three_kinds_and_none_is_calibrated_on(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").touch()
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "What is 1 plus 1?", "answer": "#### 2"}))
    kinds = quality.measured_texts(tmp_path, None, None)
    assert [*kinds] == ["GSM8K", "prose", "German"]
    read = "\n".join(map(str, samples.load(None).records))
    lines = [line for kind in ("prose", "German") for line in kinds[kind].documents[0].splitlines() if line]
    assert len(lines) > 30
    assert not [line for line in lines if line in read]
    assert kinds["German"].documents[0].count(" und ") > 20 > read.count(" und ")


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
