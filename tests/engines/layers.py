"""Single layers tried on vLLM's INT8 kernel: two of a real model, one that saturates the most, one that cannot."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engines.int8 import computed, exact_sums
from tests.shared import made_once
from w8a8.runtime.linear import W8A8Linear

MODULES = ["model.layers.5.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
LARGEST, HARMLESS = "every code 127", "weights of at most 64"
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class InVllm:
    """What vLLM makes of one input."""

    codes: Tensor
    scale: Tensor
    y: Tensor


@dataclass(frozen=True)
class Tried:
    """A layer, inputs for it, and what vLLM makes of them."""

    layer: W8A8Linear
    inputs: Mapping[str, Tensor]
    in_vllm: Mapping[str, InVllm]


def tried_in_vllm(checkpoint: Path, vllm_python: Path, factory: pytest.TempPathFactory) -> dict[str, Tried]:
    """All layers by name, in one run of vLLM's Python for all processes of a test run."""
    layers = {name: read_layer(checkpoint, name) for name in MODULES}
    inputs = {name: real_inputs(layer) for name, layer in layers.items()}
    codes = torch.randint(-127, 128, (8, 640), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = 127  # so that the scale is 1, and codes are what the input says
    layers |= {LARGEST: made_layer(127), HARMLESS: made_layer(64)}
    inputs |= {LARGEST: {"f32": torch.full((8, 640), 127.0)}, HARMLESS: {"f32": codes}}

    tensors = {f"{name}/x.{key}": x for name, given in inputs.items() for key, x in given.items()}
    for name, layer in layers.items():
        tensors |= {f"{name}/weight": layer.weight.detach(), f"{name}/weight_scale": layer.weight_scale.detach()}

    def run(folder: Path) -> None:
        folder.mkdir()
        save_file(tensors, folder / "in.safetensors")
        script, files = Path(__file__).with_name("vllm_linear.py"), ("in.safetensors", "out.safetensors")
        subprocess.run([vllm_python, script, *files], cwd=folder, check=True)

    found = load_file(made_once(factory, "vllm-layers", run) / "out.safetensors")
    return {
        name: Tried(
            layer,
            inputs[name],
            {key: InVllm(*(found[f"{name}/{what}.{key}"] for what in ("codes", "scale", "y"))) for key in inputs[name]},
        )
        for name, layer in layers.items()
    }


def relative_error(tried: Tried) -> float:
    """The largest of vLLM's errors on FP32 inputs, relative to what exact sums give."""
    errors = []
    for key, found in tried.in_vllm.items():
        if found.y.dtype == torch.float32:
            exact = computed(exact_sums, tried.layer, tried.inputs[key]).double()
            errors.append(float((found.y - exact).norm() / exact.norm()))
    return max(errors)


def real_inputs(layer: W8A8Linear) -> dict[str, Tensor]:
    """Few tokens and many, of very different sizes, with an outlier channel as real activations have, in two dtypes."""
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for dtype_name, dtype in DTYPES.items():
        for tokens in (1, 2, 7, 40):
            x = torch.randn(tokens, layer.in_features, generator=generator)
            x[:, 3] *= 100
            x *= torch.logspace(-3, 3, tokens)[:, None]
            inputs[f"{dtype_name}.{tokens}"] = x.to(dtype)
    return inputs


def made_layer(largest: int) -> W8A8Linear:
    """A layer whose weight codes all are `largest`, with scales of 1."""
    layer = W8A8Linear(640, 64, bias=False)
    layer.weight.data.fill_(largest)
    return layer


def read_layer(checkpoint: Path, module: str) -> W8A8Linear:
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            if f"{module}.weight" in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                weight, scale = file.get_tensor(f"{module}.weight"), file.get_tensor(f"{module}.weight_scale")
                layer = W8A8Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data, layer.weight_scale.data = weight, scale
                return layer
    raise AssertionError(f"{module} is not in {checkpoint}")
