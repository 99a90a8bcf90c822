"""What is broken in a quantized source is named, refused with exit code 29, and leaves nothing behind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.checkpoints import LLAMA, Array, llama_tensors, write_checkpoint
from tests.sources.decoding import bits, dtype_name
from tests.sources.makers import DECLARED, stored_as
from w8a8.cli import app
from w8a8.errors import SourceError

Stored = dict[str, tuple[str, Array]]

SCALES = {
    "fp8": "weight_scale_inv", "fp8 rows": "weight_scale", "int8": "weight_scale", "compressed-tensors": "weight_scale",
    "gptq": "scales", "awq": "scales", "mxfp4": "weight_scale", "nvfp4": "weight_scale", "bitsandbytes": "SCB",
    "nf4": "weight.absmax",
}  # fmt: skip
"""The tensor of scales of each kind."""
MODULE = "model.layers.1.mlp.down_proj"


def damaged(scale: torch.Tensor, damage: str) -> torch.Tensor | None:
    """The tensor of scales with a `damage`; None where there is none left."""
    if damage == "missing":
        return None
    if damage == "shape":
        return torch.cat([scale.reshape(-1), scale.reshape(-1)[:1]])[None]
    broken = scale.reshape(-1).clone()
    broken = broken.view(torch.uint8) if scale.itemsize == 1 else broken
    broken[-1] = 0 if damage == "zero" else torch.nan if broken.is_floating_point() else 255
    return broken.view(scale.dtype).reshape(scale.shape)


def refusal(folder: Path, stored: Stored, config: Mapping[str, Any]) -> str:
    """What `quantize` says of a source that it refuses as broken; it has left nothing behind."""
    source, out = write_checkpoint(folder / "source", stored, config=config, shards=2), folder / "made" / "out"
    out.parent.mkdir()
    found = CliRunner().invoke(app, ["quantize", str(source), str(out), "--quiet"])
    assert isinstance(found.exception, SourceError), found.exception
    assert not list(out.parent.iterdir())
    said = str(found.exception)
    assert str(source) in said or ".safetensors" in said
    assert "download" in said or "quantize the BF16 original" in said
    return said


def stored_llama(kind: str, scale: str = "", damage: str = "") -> Stored:
    """A Llama's tensors with its projections stored as `kind`, and a `damage` to the tensor called `scale`."""
    stored: Stored = {}
    for name, (dtype, values) in llama_tensors().items():
        if not name.endswith("_proj.weight"):
            stored[name] = dtype, values
            continue
        for leaf, tensor in stored_as(kind, name, torch.from_numpy(values)).items():
            if (kept := damaged(tensor, damage) if leaf == scale else tensor) is not None:
                stored[leaf] = dtype_name(kept), bits(kept)
    return stored


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        (kind, damage)
        for kind in SCALES
        for damage in ("missing", "shape", "zero", "NaN")
        if damage != "zero" or kind not in {"mxfp4", "nf4"}  # an exponent, and a block of zeros
    ],
)
def test_a_broken_scale_is_named_and_refused(tmp_path: Path, kind: str, damage: str) -> None:
    stored = stored_llama(kind, f"{MODULE}.{SCALES[kind]}", damage)
    assert MODULE in refusal(tmp_path, stored, LLAMA | {"quantization_config": DECLARED[kind]})


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("fp8", {"weight_block_size": [48, 48]}),
        ("gptq", {"group_size": 48}),
        ("awq", {"group_size": 48}),
        ("compressed-tensors", {"config_groups": {"group": {"targets": ["Linear"], "weights": {"group_size": 48}}}}),
    ],
)
def test_blocks_that_do_not_divide_are_refused(tmp_path: Path, kind: str, sizes: Mapping[str, Any]) -> None:
    config = LLAMA | {"quantization_config": {**DECLARED[kind], **sizes}}
    assert "of 48" in refusal(tmp_path, stored_llama(kind), config)


def test_a_missing_expert_is_named_and_refused(tmp_path: Path) -> None:
    stored = stored_llama("fp8")
    weight = torch.ones(16, 64)
    for expert in (0, 1, 3):
        for leaf in ("gate_proj", "up_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}.weight"
            stored |= {n: (dtype_name(t), bits(t)) for n, t in stored_as("fp8", name, weight).items()}
    said = refusal(tmp_path, stored, LLAMA | {"model_type": "qwen3_moe", "quantization_config": DECLARED["fp8"]})
    assert "experts.2.gate_proj.weight is missing" in said


def test_the_exit_code_is_29() -> None:
    assert SourceError.exit_code == 29
