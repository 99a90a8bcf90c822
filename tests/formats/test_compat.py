"""Compatibility modes against what the tools themselves wrote, byte for byte.

The golden folders were written by AMD Quark 0.11.2 and 0.13 and llm-compressor 0.14.0.1; their rows are zeros, ties,
subnormals, the largest and smallest numbers of each dtype, and the neighbours of every rounding threshold.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import w8a8
from tests.checkpoints import read_tensor
from w8a8.checkpoint import Checkpoint
from w8a8.quantization import Options

EXTRA = Path(__file__).parents[1] / "golden-extra"
TOOLS = {
    "quark-0.11.2": "quark-0.11",
    "quark-0.13": "quark-0.13",
    "llmcompressor-0.14.0.1": "llm-compressor-0.14",
}

Contents = dict[str, tuple[str, str, tuple[int, ...], bytes]]


def contents(folder: Path) -> Contents:
    """Every tensor of a checkpoint: name -> (shard, dtype, shape, bytes)."""
    checkpoint = Checkpoint.open(folder)
    return {t.name: (t.shard, t.dtype, t.shape, read_tensor(checkpoint, t)) for t in checkpoint.tensors.values()}


def quantization_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def assert_same(ours: Path, theirs: Path) -> None:
    found, expected = contents(ours), contents(theirs)
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert different == []
    # As text, because the order of keys is part of what the tool writes.
    assert json.dumps(quantization_config(ours)) == json.dumps(quantization_config(theirs))


@pytest.mark.parametrize("tool", TOOLS)
def test_compat_reproduces_the_tools_tensors_and_config(tool: str, golden: Path, tmp_path: Path) -> None:
    w8a8.quantize(golden / "source", tmp_path / "out", Options(compat=TOOLS[tool]))
    assert_same(tmp_path / "out", golden / tool)


@pytest.mark.parametrize("case", ["rand-bf16", "rand-fp16", "rand-fp32"])
@pytest.mark.parametrize("tool", ["quark-0.13", "llmcompressor-0.14.0.1"])
def test_compat_reproduces_every_dtype(case: str, tool: str, tmp_path: Path) -> None:
    w8a8.quantize(EXTRA / case / "source", tmp_path / "out", Options(compat=TOOLS[tool], include=["*.one", "*.thin"]))
    assert_same(tmp_path / "out", EXTRA / case / tool)


@pytest.mark.parametrize("case", ["rand-bf16", "rand-fp16", "rand-fp32"])
@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float16", "none"])
def test_compat_reproduces_quark_011_whose_scales_depend_on_the_configs_torch_dtype(
    case: str, torch_dtype: str, tmp_path: Path
) -> None:
    source = shutil.copytree(EXTRA / case / "source", tmp_path / "source")
    shutil.copy(EXTRA / case / f"config-torch_dtype-{torch_dtype}.json", source / "config.json")
    w8a8.quantize(source, tmp_path / "out", Options(compat="quark-0.11", include=["*.one", "*.thin"]))
    assert_same(tmp_path / "out", EXTRA / case / f"quark-0.11.2-torch_dtype-{torch_dtype}")


@pytest.mark.parametrize("tool", ["quark-0.11.2", "quark-0.13"])
def test_compat_reproduces_shards_of_mixed_dtypes(tool: str, tmp_path: Path) -> None:
    linears = ["z.first", "a.second", "m.third", "b.w_up", "b.é"]
    w8a8.quantize(EXTRA / "mixed-sharded/source", tmp_path / "out", Options(compat=TOOLS[tool], include=linears))
    assert_same(tmp_path / "out", EXTRA / "mixed-sharded" / tool)
