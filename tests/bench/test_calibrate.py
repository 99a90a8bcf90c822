"""bench calibrate: every contender runs, and the table says what was measured."""

from pathlib import Path

import pytest
import torch

from w8a8.bench.calibrate import EMPTY, PLAIN, RECIPES, CalibrateResult, Row, contend, make_checkpoint, show
from w8a8.checkpoint import Checkpoint

pytestmark = pytest.mark.slow


def test_every_contender_times_the_layers_behind_the_first(tmp_path: Path) -> None:
    source, text = tmp_path / "source", tmp_path / "text.txt"
    with torch.random.fork_rng():
        nbytes = make_checkpoint(source, text, 16, 3, 3 * 24, lambda _: None)
    layers = [t for t in Checkpoint.open(source).tensors.values() if ".layers." in t.name and t.name.endswith("weight")]
    assert nbytes == sum(2 * t.nbytes for t in layers) // 3
    for name in (PLAIN, RECIPES[-1]):
        seconds = contend(name, str(source), str(text), str(tmp_path / "out"), "3", "24")
        assert len(seconds) == 2
        assert min(seconds) > 0
    assert contend(EMPTY, str(source), str(text), str(tmp_path / "out"), "3", "24") == [0.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "text.txt"]


def test_times_are_in_plain_forwards_and_memory_in_layers() -> None:
    rows = (Row(EMPTY, 0.0, 500.0), Row(PLAIN, 2.0, 600.0), Row("smooth", 9.0, 900.0), Row("smooth+gptq", 20.0, 1000.0))
    result = CalibrateResult(4, 3, 100 * 2**20, 32, 512, rows)
    found = {row["name"]: (row["ratio"], row["layers"]) for row in result.to_dict()["rows"]}
    assert found == {EMPTY: (0.0, 0.0), PLAIN: (1.0, 1.0), "smooth": (4.5, 4.0), "smooth+gptq": (10.0, 5.0)}
    said: list[object] = []
    show(result, said.append)
    assert "sizes divided by 4: 100 MiB each in float32; 32 samples of 512 tokens" in str(said[0])
