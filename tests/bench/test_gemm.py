"""`w8a8 bench gemm` without a GPU: all of it but the GPU's own clock, on tiny layers under Triton's interpreter."""

import json
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.engines.conftest import vllm_python  # noqa: F401
from tests.interpreter import Interpreted
from w8a8.bench import gemm
from w8a8.bench.contest import HostClock
from w8a8.bench.gemm import GemmResult, GemmRow, QuantizeRow, shapes, show
from w8a8.cli import app
from w8a8.errors import NoDeviceError
from w8a8.kernels.gpu.tiles import Tile

pytestmark = pytest.mark.slow


def run_small(vllm: Path | None, cache: Path | None) -> GemmResult:
    """Runs where kernels are interpreted; tunes where there is a cache to store into."""
    import os

    from w8a8.bench import tuning

    if cache:
        os.environ["XDG_CACHE_HOME"] = str(cache)
        tuning.candidates = lambda *_: [Tile(16, 32, 32), Tile(16, 16, 64, swap=True)]
    return gemm.bench(
        runs=2,
        tune=bool(cache),
        vllm=vllm,
        device=torch.device("cpu"),
        clock=HostClock(),
        layers=((48, 64), (32, 96)),
        tokens=(1, 5),
        quantized=((3, 64),),
        copied=1 << 16,
    )


@pytest.fixture(scope="module")
def result(interpreted: Interpreted, vllm_python: Path) -> GemmResult:  # noqa: F811
    return interpreted(__name__, "run_small", vllm_python, None)  # type: ignore[no-any-return]


def test_every_layer_is_timed_and_checked_beside_vllms_kernel(result: GemmResult) -> None:
    assert [(row.outputs, row.inputs, row.tokens) for row in result.rows] == [
        (48, 64, 1),
        (48, 64, 5),
        (32, 96, 1),
        (32, 96, 5),
    ]
    for row in result.rows:
        assert set(row.ms) == {"w8a8", "vllm", "int_mm", "bf16"}
        assert all(len(ms) == 2 and min(ms) > 0 for ms in row.ms.values())
    assert result.versions["vllm"] == "0.32.0"
    assert result.stored is None


def test_its_json_is_what_to_report_back(result: GemmResult) -> None:
    values = json.loads(json.dumps(result.to_dict()))
    assert {"device", "arch", "versions", "copy_gb_s", "rows", "quantized", "geometric_mean"} <= set(values)
    assert {"torch", "triton", "vllm", "cuda", "hip", "driver"} == set(values["versions"])
    assert {"tile", "median_ms", "ratio", "gb_s", "tera_ops"} <= set(values["rows"][0])


def test_its_table_shows_every_row_and_the_means(result: GemmResult) -> None:
    text = StringIO()
    show(result, Console(file=text, width=200).print)
    lines = text.getvalue().splitlines()
    assert sum(line.startswith(("48 x 64", "32 x 96")) for line in lines) == 4
    assert any("vLLM's Triton kernel" in line for line in lines)
    assert any("quantize_per_token 3 x 64" in line for line in lines)


def test_tuning_stores_what_the_kernels_then_take(interpreted: Interpreted, tmp_path: Path) -> None:
    result = interpreted(__name__, "run_small", None, tmp_path)
    path = tmp_path / "w8a8" / "tiles" / "cpu.json"
    assert result.stored == str(path)
    stored = json.loads(path.read_text())["tuned"]
    assert [(t["m"], t["n"], t["k"]) for t in stored] == [(1, 48, 64), (5, 48, 64), (1, 32, 96), (5, 32, 96)]
    assert all(t["vllm_ms"] is None and t["ms"] > 0 for t in stored)
    assert {row.tile for row in result.rows} <= {"16x32x32", "16x16x64 swap"}


def test_figures_follow_from_the_medians() -> None:
    row = GemmRow(4, 1000, 2000, "t", {"w8a8": (3.0, 1.0, 2.0), "vllm": (4.0, 4.0, 4.0)})
    values = row.to_dict()
    assert values["median_ms"] == {"w8a8": 2.0, "vllm": 4.0}
    assert values["ratio"] == {"vllm": 2.0}
    assert values["gb_s"] == pytest.approx((2_000_000 + 4 * 4000) / 2 / 1e6)
    assert values["tera_ops"] == pytest.approx(0.008)
    other = GemmRow(4, 1000, 2000, "t", {"w8a8": (1.0,), "vllm": (8.0,)})
    result = GemmResult("d", "a", {}, 10.0, (row, other), (QuantizeRow(2, 1000, (3.0, 1.0, 2.0)),), None)
    assert result.mean("vllm") == pytest.approx(4.0)
    assert result.mean("bf16") is None
    assert result.to_dict()["quantized"][0]["gb_s"] == pytest.approx(0.003)


def test_shapes_are_the_models_and_their_shares() -> None:
    assert (43008, 5376) in shapes((1,))
    assert (21504, 5376) in shapes((2,))
    assert (5376, 21504 // 4) in shapes((4,))
    assert len(shapes()) == len(set(shapes()))


def test_without_a_gpu_the_command_says_what_to_do() -> None:
    done = CliRunner().invoke(app, ["bench", "gemm"])
    assert isinstance(done.exception, NoDeviceError)
    with pytest.raises(NoDeviceError, match="bench compile"):
        gemm.find_device()
