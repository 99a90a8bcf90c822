"""`w8a8 bench compile`: every tile of the tables, compiled for its targets, uses matrix units and spills nothing."""

import json
import re
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.engines.conftest import vllm_python  # noqa: F401
from w8a8.bench import compiled
from w8a8.bench.assembly import Loop, disassembled
from w8a8.bench.compiled import CompileResult, Row, bench, ours, show
from w8a8.bench.model import MLP_SHAPES
from w8a8.bench.targets import ARCHITECTURES, machine, target
from w8a8.bench.vllm_kernel import find_vllm
from w8a8.cli import app
from w8a8.errors import MissingExtraError, UsageError
from w8a8.kernels.gpu.tiles import family, shipped

pytestmark = pytest.mark.slow

INSTRUCTIONS = {
    "gfx11": "v_wmma_i32_16x16x16_iu8",
    "gfx12": "v_wmma_i32_16x16x16_iu8",
    "gfx9": r"v_mfma_i32_(16x16x32|32x32x16)_i8",
    "sm_8": r"IMMA\.16832\.S8\.S8",
    "sm_9": r"IGMMA\.64x\d+x32\.S8\.S8",
    "sm_10": "UTCIMMA",
    "sm_12": r"IMMA\.16832\.S8\.S8",
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_tile_compiles_to_matrix_instructions_and_spills_nothing(arch: str) -> None:
    expected = next(words for name, words in INSTRUCTIONS.items() if re.match(name + r"\d+", arch))
    for most, *band in family(arch).bands:
        tokens = int(min(most, 4096))
        splits = (1, 3) if most <= 256 else (1,)
        tiles = {replace(tile, split_k=split) for tile in band for split in splits}
        for tile in {*tiles, shipped(arch, tokens, 5376, 21504)}:
            row = ours(arch, tokens, 5376, 21504, tile)
            loop = row.loop
            assert re.match(expected, loop.instruction), row
            assert loop.load_bits == 128, row
            assert loop.spills == 0, row
            assert 0 < loop.shared <= machine(arch).block, row
            assert loop.waves >= 1, row


@pytest.fixture(scope="module")
def beside_vllm(vllm_python: Path) -> CompileResult:  # noqa: F811
    return bench(["gfx1100"], vllm=vllm_python)


def test_on_rdna3_the_inner_loop_is_denser_than_vllms_in_every_band(beside_vllm: CompileResult) -> None:
    rows = {(row.outputs, row.tokens, row.kernel): row for row in beside_vllm.rows}
    assert len(rows) == 2 * len(compiled.TOKENS) * len(MLP_SHAPES)
    for (outputs, tokens, kernel), row in rows.items():
        if kernel == "w8a8":
            theirs = rows[outputs, tokens, "vllm"]
            assert row.loop.density > theirs.loop.density, (row, theirs)
            assert row.useful > theirs.useful, (row, theirs)


def test_vllms_kernel_is_the_one_with_its_own_tiles(beside_vllm: CompileResult) -> None:
    assert beside_vllm.vllm == "0.32.0"
    tiles = {(row.tokens, row.outputs): row.tile for row in beside_vllm.rows if row.kernel == "vllm"}
    assert tiles[1, 21504] == "64x128x256"
    assert tiles[1, 5376] == "64x64x256"
    assert tiles[4096, 5376] == "128x128x128"


def test_the_table_shows_every_row(beside_vllm: CompileResult) -> None:
    text = StringIO()
    show(beside_vllm, Console(file=text, width=200).print)
    head, titles, *lines = text.getvalue().splitlines()
    assert "vLLM 0.32.0" in head
    assert titles.split()[0] == "arch"
    assert len(lines) == len(beside_vllm.rows)
    values = json.loads(json.dumps(beside_vllm.to_dict()))["rows"][0]
    assert values["density"] == values["loop"]["matrix"] / values["loop"]["instructions"]


@pytest.mark.parametrize("arch", ["gfx1100", "gfx942", "sm_80", "sm_90"])
def test_nothing_of_the_epilogue_is_contracted(arch: str) -> None:
    """A fused multiply-add would round once where the layer rounds twice."""
    from w8a8.kernels.gpu.int8 import scaled_int8_mm

    x, w, x_scale, w_scale = compiled._shapes(64, 512, 512)
    bias = torch.empty(512, dtype=torch.bfloat16, device="meta")
    with target(arch) as kernels:
        for split in (1, 2):
            tile = replace(shipped(arch, 64, 512, 512), split_k=split)
            scaled_int8_mm(x, w, x_scale, w_scale, bias, tile=tile)
    _, splitting, _ = kernels
    assert [kernel.name for kernel in kernels] == ["_product_kernel", "_product_kernel", "_finish_kernel"]
    for kernel in kernels:
        text = kernel.asm["amdgcn"] if arch.startswith("gfx") else disassembled(kernel.asm["cubin"])[0]
        assert not re.search(r"\bFFMA|v_(pk_|dual_)?(fma|fmac|mad)_f32", text)
        assert kernel is splitting or re.search(r"\bFMUL|v_(pk_|dual_)?mul_f32", text)


@pytest.mark.parametrize("arch", ["gfx1100", "gfx942", "sm_80", "sm_90"])
def test_quantizing_rounds_by_an_addition_that_is_not_folded_away(arch: str) -> None:
    from w8a8.kernels.gpu.quantize import quantize_per_token

    with target(arch) as kernels:
        quantize_per_token(torch.empty(4, 5376, dtype=torch.bfloat16, device="meta"))
    text = kernels[0].asm["amdgcn"] if arch.startswith("gfx") else disassembled(kernels[0].asm["cubin"])[0]
    assert "0x4b400000" in text or "12582912" in text
    assert re.search(r"(buffer|global)_load_(b128|dwordx4)|LDG\.E\.128", text)
    if arch.startswith("gfx"):
        assert text.count("v_div_fixup_f32") == 2  # 127 / amax and amax / 127, as IEEE has them
    else:
        assert "div.rn.f32" in kernels[0].asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_that_quantizes_compiles_for_every_dtype(dtype: torch.dtype) -> None:
    """The interpreter takes what the compiler refuses."""
    from w8a8.kernels.gpu import quantize

    x, weight = torch.empty(4, 640, dtype=dtype, device="meta"), torch.empty(640, dtype=dtype, device="meta")
    with target("sm_90") as kernels:
        quantize.quantize_per_token(x)
        quantize.rms_norm_quantize(x, weight, 1e-6, norm="gemma3", residual=torch.empty_like(x))
        quantize.silu_and_mul_quantize(x)
        quantize.gelu_and_mul_quantize(x)
    assert [kernel.metadata.name for kernel in kernels] == [
        "_quantize_kernel",
        "_rms_norm_kernel",
        "_gated_kernel",
        "_gated_kernel",
    ]


def test_bf16_results_are_rounded_by_the_hardware() -> None:
    from w8a8.kernels.gpu.int8 import scaled_int8_mm

    with target("sm_90") as kernels:
        scaled_int8_mm(*compiled._shapes(64, 512, 512))
    assert any("cvt.rn.bf16" in kernel.asm["ptx"] for kernel in kernels)


@pytest.mark.parametrize("command", ["compile", "gemm"])
def test_without_triton_the_command_says_what_to_install(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    done = CliRunner().invoke(app, ["bench", command])
    assert isinstance(done.exception, MissingExtraError)
    assert "pip install" in str(done.exception)


def test_a_place_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        find_vllm(tmp_path)


def test_useful_leaves_out_rows_that_no_token_fills() -> None:
    loop = Loop("IMMA", 10, 100, 128, 64, 1024, 4, 0, None)
    row = Row("sm_80", 24, 8, 8, "w8a8", "", 16, loop)
    assert loop.density == 0.1
    assert row.useful == pytest.approx(0.1 * 24 / 32)


def test_the_command_says_that_there_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "TOKENS", (1,))
    done = CliRunner().invoke(app, ["bench", "compile", "sm_80", "--json"])
    assert done.exit_code == 0
    assert "no vLLM here" in done.stderr
    values = json.loads(done.stdout)
    assert values["vllm"] is None
    assert {row["kernel"] for row in values["rows"]} == {"w8a8"}
    assert {row["loop"]["cycles"] for row in values["rows"]} == {None}
