"""What is broken in a quantized source is named, refused with exit code 29, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.sources.decoding import bits, dtype_name
from tests.sources.makers import DECLARED, stored_as
from w8a8.cli import app
from w8a8.errors import SourceError

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
    stored = {}
    for name, (dtype, values) in llama_tensors().items():
        stored[name] = dtype, values
        if name.endswith("_proj.weight"):
            del stored[name]
            stored |= {n: (dtype_name(t), bits(t)) for n, t in stored_as(kind, name, torch.from_numpy(values)).items()}
        if name == f"{MODULE}.weight":
            whole = stored_as(kind, name, torch.from_numpy(values))[scale := f"{MODULE}.{SCALES[kind]}"]
            del stored[scale]
            if (broken := damaged(whole, damage)) is not None:
                stored[scale] = dtype_name(broken), bits(broken)
    config = LLAMA | {"quantization_config": DECLARED[kind]}
    source, out = write_checkpoint(tmp_path / "source", stored, config=config, shards=2), tmp_path / "made" / "out"
    out.parent.mkdir()
    found = CliRunner().invoke(app, ["quantize", str(source), str(out), "--quiet"])
    assert isinstance(found.exception, SourceError), found.exception
    said = str(found.exception)
    assert MODULE in said
    assert str(source) in said or ".safetensors" in said
    assert "download the checkpoint again, or quantize the BF16 original" in said
    assert not list(out.parent.iterdir())


def test_the_exit_code_is_29() -> None:
    assert SourceError.exit_code == 29
