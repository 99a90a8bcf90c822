"""A source that is quantized already is quantized as its dequantized copy is: the same codes, the same scales."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import w8a8
from tests.checkpoints import LLAMA, llama_tensors, read_tensor, write_checkpoint
from tests.sources.decoding import Tensors, bits, dtype_name
from tests.sources.test_gptq import words
from w8a8.checkpoint import Checkpoint
from w8a8.plan.viewing import view_of
from w8a8.sources.rows import RowReader

BF16, F32 = torch.bfloat16, torch.float32
Maker = Callable[[torch.Tensor], Tensors]


def fp8(weight: torch.Tensor) -> Tensors:
    """Blocks of 128 x 128, as DeepSeek's."""
    grid = [-(-size // 128) for size in weight.shape]
    scale = torch.full(grid, weight.abs().max() / 448)
    return {"weight": (weight / scale[0, 0]).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def fp8_rows(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale.to(BF16), "input_scale": scale[0]}


def int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _fours(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = weight.unflatten(1, (-1, group)).abs().amax(2) / 7
    return (weight / scale.repeat_interleave(group, 1)).round().int().clamp(-8, 7) + 8, scale


def compressed(weight: torch.Tensor) -> Tensors:
    codes, scale = _fours(weight, 32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": words(codes, 4), "weight_scale": scale.to(BF16), "weight_shape": shape}


def gptq(weight: torch.Tensor) -> Tensors:
    codes, scale = _fours(weight, 32)
    zeros = words(torch.full(scale.T.shape, 7), 4)
    order = (torch.arange(weight.shape[1]) // 32).int()
    return {"qweight": words(codes, 4).T.contiguous(), "qzeros": zeros, "scales": scale.T.to(BF16), "g_idx": order}


def awq(weight: torch.Tensor) -> Tensors:
    codes, scale = _fours(weight, 32)
    shuffled = codes.T.reshape(weight.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(codes.T.shape)
    return {"qweight": words(shuffled, 4), "qzeros": words(torch.full(scale.T.shape, 8), 4), "scales": scale.T.to(BF16)}


def mxfp4(weight: torch.Tensor) -> Tensors:
    packed = torch.from_numpy(
        np.random.default_rng(weight.numel()).integers(0, 256, (len(weight), weight.shape[1] // 2))
    )
    return {
        "weight_packed": packed.byte(),
        "weight_scale": torch.full((len(weight), weight.shape[1] // 32), 120).byte(),
    }


def nvfp4(weight: torch.Tensor) -> Tensors:
    packed = mxfp4(weight)["weight_packed"]
    scale = torch.full((len(weight), weight.shape[1] // 16), 3.5).to(torch.float8_e4m3fn)
    return {"weight": packed, "weight_scale": scale, "weight_scale_2": torch.tensor(0.0021)}


MAKERS: dict[str, tuple[Maker, str]] = {
    "fp8": (fp8, "FP8 in blocks of 128 x 128"),
    "fp8 rows": (fp8_rows, "FP8 per row"),
    "int8": (int8, "INT8 per row"),
    "compressed-tensors": (compressed, "INT4 in groups of 32"),
    "gptq": (gptq, "GPTQ INT4 in groups of 32"),
    "awq": (awq, "AWQ INT4 in groups of 32"),
    "mxfp4": (mxfp4, "MXFP4"),
    "nvfp4": (nvfp4, "NVFP4"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_codes_and_scales_are_those_of_the_dequantized_copy(tmp_path: Path, kind: str) -> None:
    make, label = MAKERS[kind]
    stored = {}
    for name, (dtype, values) in llama_tensors(layers=1).items():
        if "_proj" not in name:
            stored[name] = dtype, values
            continue
        for leaf, tensor in make(torch.from_numpy(values)).items():
            stored[f"{name.removesuffix('weight')}{leaf}"] = dtype_name(tensor), bits(tensor)
    source = write_checkpoint(tmp_path / "source", stored, shards=2)
    # The same as a dense checkpoint, in the order of the source
    view = view_of(Checkpoint.open(source))
    assert view.quantized == label
    reader = RowReader(source)
    dense = {name: (tensor.dtype, reader.values(tensor)) for name, tensor in view.tensors.items()}
    assert {name: values.shape for name, (_, values) in dense.items()} == {
        name: values.shape for name, (_, values) in llama_tensors(layers=1).items()
    }
    write_checkpoint(tmp_path / "dense", dense, config=LLAMA, shards=2)
    results = []
    for folder in ("source", "dense"):
        w8a8.quantize(tmp_path / folder, out := tmp_path / f"{folder}-w8a8")
        assert w8a8.verify(out, tmp_path / folder).ok
        opened = Checkpoint.open(out)
        results.append({name: read_tensor(opened, spec) for name, spec in opened.tensors.items()})
    assert results[0] == results[1]
