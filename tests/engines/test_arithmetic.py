"""One layer on vLLM's INT8 kernel and on ours: the same codes, the same scales, the same sums.

Whole models cannot be compared so closely: one code that rounds the other way because an activation differs in its last
bit moves what follows by a whole quantization step, and after some layers by as much as quantizing moved it at all.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from w8a8.runtime.linear import W8A8Linear, quantize_tokens

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@pytest.mark.parametrize("module", ["model.layers.5.mlp.down_proj", "model.layers.0.self_attn.q_proj"])
def test_a_layer_of_the_real_model_computes_what_vllm_computes(
    module: str, gemma3_formats: dict[str, Path], vllm_python: Path, tmp_path: Path
) -> None:
    layer = read_layer(gemma3_formats["quark"], module)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for dtype_name, dtype in DTYPES.items():
        for tokens in (1, 2, 7, 40):
            x = torch.randn(tokens, layer.in_features, generator=generator)
            x[:, 3] *= 100  # an outlier channel, as real activations have
            x *= torch.logspace(-3, 3, tokens)[:, None]
            inputs[f"x.{dtype_name}.{tokens}"] = x.to(dtype)
    save_file(
        {**inputs, "weight": layer.weight.detach(), "weight_scale": layer.weight_scale.detach()},
        tmp_path / "in.safetensors",
    )
    script = Path(__file__).with_name("vllm_linear.py")
    subprocess.run([vllm_python, script, tmp_path / "in.safetensors", tmp_path / "out.safetensors"], check=True)
    theirs = load_file(tmp_path / "out.safetensors")

    for name, x in inputs.items():
        _, _, key = name.partition(".")
        codes, scale = quantize_tokens(x)
        assert torch.equal(codes, theirs[f"codes.{key}"]), name
        assert torch.equal(scale.reshape(-1), theirs[f"scale.{key}"].reshape(-1)), name
        # They scale in another order, so the last bits of FP32 may differ, and what that rounds to in BF16.
        torch.testing.assert_close(
            layer(x), theirs[f"y.{key}"], rtol=1e-6 if x.dtype == torch.float32 else 2**-7, atol=0, msg=name
        )


def read_layer(checkpoint: Path, module: str) -> W8A8Linear:
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            if f"{module}.weight" in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                weight, scale = file.get_tensor(f"{module}.weight"), file.get_tensor(f"{module}.weight_scale")
                layer = W8A8Linear(weight.shape[1], weight.shape[0], bias=False)
                layer.weight.data, layer.weight_scale.data = weight, scale
                return layer
    raise AssertionError(f"{module} is not in {checkpoint}")
