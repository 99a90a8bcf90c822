"""The ways in which a weight can be stored that `quantize` reads, each as published checkpoints have it."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.checkpoints import write_checkpoint
from tests.sources.decoding import Tensors, bits, dtype_name
from tests.sources.test_gptq import words

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


def bitsandbytes(weight: torch.Tensor) -> Tensors:
    largest = weight.abs().amax(1)
    layout = torch.zeros((), dtype=torch.uint8)
    return {"weight": (weight / largest[:, None] * 127).round().to(torch.int8), "SCB": largest, "weight_format": layout}


def nf4(weight: torch.Tensor) -> Tensors:
    table, blocks = torch.linspace(-1, 1, 16), weight.reshape(-1, 32)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None] + 1) * 7.5).round().byte().reshape(-1)
    state = {"quant_type": "nf4", "blocksize": 32, "dtype": "bfloat16", "shape": list(weight.shape)}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    packed = (codes[::2] << 4 | codes[1::2])[:, None]
    beside = {"absmax": absmax, "quant_map": table, "quant_state.bitsandbytes__nf4": text}
    return {"weight": packed, **{f"weight.{leaf}": tensor for leaf, tensor in beside.items()}}


MAKERS: dict[str, tuple[Maker, str]] = {
    "fp8": (fp8, "FP8 in blocks of 128 x 128"),
    "fp8 rows": (fp8_rows, "FP8 per row"),
    "int8": (int8, "INT8 per row"),
    "compressed-tensors": (compressed, "INT4 in groups of 32"),
    "gptq": (gptq, "GPTQ INT4 in groups of 32"),
    "awq": (awq, "AWQ INT4 in groups of 32"),
    "mxfp4": (mxfp4, "MXFP4"),
    "nvfp4": (nvfp4, "NVFP4"),
    "bitsandbytes": (bitsandbytes, "INT8 per row"),
    "nf4": (nf4, "bitsandbytes NF4"),
}

DECLARED: Mapping[str, Mapping[str, Any]] = {
    "fp8": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    "fp8 rows": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "int8": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    },
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "mxfp4": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
    "nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}
"""What config.json says of each."""


def stored_as(kind: str, name: str, weight: torch.Tensor) -> Tensors:
    """The tensors that hold the weight `name` as `kind`."""
    return {f"{name.removesuffix('weight')}{leaf}": t for leaf, t in MAKERS[kind][0](weight.float()).items()}


def rewrite(source: Path, out: Path, kind: str, shards: int = 1) -> Path:
    """Write the dense checkpoint `source` with its projections stored as `kind`, and all that lies beside it."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    stored: Tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        for name, weight in load_file(shard).items():
            stored |= stored_as(kind, name, weight) if name.endswith("_proj.weight") else {name: weight}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": DECLARED[kind]}
    return write_checkpoint(out, {n: (dtype_name(t), bits(t)) for n, t in stored.items()}, config=config, shards=shards)
