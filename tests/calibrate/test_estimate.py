"""`quantize --recipe --dry-run`: says what a calibration takes, by a layer of each kind, and leaves nothing behind."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.calibrate.checkpoints import make, make_elastic_gemma
from tests.calibrate.test_run import SIZES
from tests.calibrate.test_run import _one_thread as _one_thread
from tests.calibrate.test_run import text as text
from tests.checkpoints import folder_bytes
from tests.command import W8A8, cli
from w8a8.calibrate.estimate import Estimate
from w8a8.checkpoint import Checkpoint
from w8a8.quantization import Options, calibrated, estimated, prepare

pytestmark = pytest.mark.slow


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def estimate(source: Path, text: Path, **options: Any) -> Estimate:
    found = estimated(prepare(source, Options(**{"recipe": "auto", "calibration": str(text), **SIZES, **options})))
    assert found is not None
    return found


def times(found: Estimate, what: str) -> list[int]:
    return [part.times for part in found.parts if part.name.startswith(what)]


def arguments(source: Path, text: Path, out: Path, samples: int = 9) -> list[str]:
    sizes = ("--samples", str(samples), "--tokens", "48")
    return ["quantize", str(source), str(out), "--recipe", "auto", "--calibration", str(text), *sizes, "--dry-run"]


def test_it_prints_positive_numbers_and_writes_nothing(text: Path, temporary: Path, tmp_path: Path) -> None:
    source, out = make(tmp_path / "llama"), tmp_path / "out"
    before, there = folder_bytes(source), sorted(tmp_path.iterdir())
    done = cli(*arguments(source, text, out), "--json", env={"TMPDIR": str(temporary)}, check=True)
    assert sorted(tmp_path.iterdir()) == there
    assert folder_bytes(source) == before
    assert not [*temporary.iterdir()]
    found = json.loads(done.stdout)["estimate"]
    assert (found["samples"], found["tokens"], found["layers"], found["of"]) == (9, 48, [0], 3)
    assert all(part["seconds"] >= 0 and part["times"] > 0 for part in found["parts"])
    assert found["seconds"] == pytest.approx(sum(part["seconds"] * part["times"] for part in found["parts"]))
    tensors = Checkpoint.open(source).tensors
    layer = sum(4 * tensor.numel for name, tensor in tensors.items() if ".layers.0." in name)
    states = 9 * 48 * 64 * 4
    assert found["memory"] > layer + found["counted"]
    assert found["counted"] > 3 * states
    assert found["disk"]["needed"] > found["disk"]["result"] + 2 * states
    said = cli(*arguments(source, text, out), env={"TMPDIR": str(temporary)}, check=True).stdout
    assert "an estimate, 1 layer of 3 run here (0)" in said
    assert [line.split()[0] for line in said.splitlines()[-3:]] == ["about", "memory", "disk"]


def test_without_a_recipe_that_calibrates_there_is_none(tmp_path: Path) -> None:
    source = make(tmp_path / "llama")
    assert estimated(prepare(source)) is None
    assert "estimate" not in json.loads(cli("quantize", source, "--dry-run", "--json", check=True).stdout)


def test_every_kind_of_layer_is_run_once_and_stands_for_all_of_its_kind(text: Path, tmp_path: Path) -> None:
    found = estimate(make_elastic_gemma(tmp_path / "gemma"), text)
    assert found.of == 6
    assert found.layers == (0, 1, 2, 3, 4)  # 1 and 2 keep keys and values for 3 to 5
    for step in ("costs, forwards", "costs, backwards", "calibrate"):
        assert sum(times(found, step)) == 6


def test_a_second_pass_for_layers_that_stay_is_counted(text: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "llama")
    once, twice = estimate(source, text), estimate(source, text, keep_bf16="10%")
    assert times(once, "calibrate") == [3]
    assert times(twice, "calibrate") == [6]
    assert times(once, "costs") == times(twice, "costs")
    assert twice.disk.needed > once.disk.needed


def test_the_disk_it_says_holds_what_a_calibration_writes(text: Path, tmp_path: Path) -> None:
    source, out = make(tmp_path / "llama"), tmp_path / "out"
    said = estimate(source, text).disk
    with calibrated(prepare(source, Options(recipe="auto", calibration=str(text), **SIZES)), out) as ready:
        files = (path for path in tmp_path.glob(".out.*/**/*") if path.is_file())
        written = sum(path.stat().st_size for path in files)
    assert 0 < written < said.needed
    assert said.result == pytest.approx(ready.plan.bytes_out, rel=0.01)  # headers say more then


def test_an_interrupt_leaves_nothing(text: Path, temporary: Path, tmp_path: Path) -> None:
    source, out = make(tmp_path / "llama"), tmp_path / "out"
    command = [*W8A8, *arguments(source, text, out, samples=99)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not [*temporary.glob("w8a8-estimate-*/*")]:
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        printed, said = run.communicate()
    assert run.returncode == 130
    assert "estimate" not in printed
    assert said.splitlines()[-1] == "w8a8: interrupted; nothing was begun"
    assert not [*temporary.iterdir()]
    assert not [*tmp_path.glob(".out*")]
