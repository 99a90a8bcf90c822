"""Stacks of experts in FP8 and MXFP4, seen as a matrix for each expert and projection, equal the dequantized stack."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import w8a8
from tests.checkpoints import write_checkpoint
from tests.sources.decoding import Tensors, bits, dtype_name, written
from tests.sources.test_fp4 import random
from tests.sources.test_scaled import codes, scales
from w8a8.quantization import Options
from w8a8.sources.experts import Stack
from w8a8.sources.opening import view, with_stacks
from w8a8.sources.rows import RowReader

BASE = "model.layers.0.mlp.experts"
EXPERTS, INPUTS, OUTPUTS = 3, 160, 64


def mxfp4() -> tuple[Tensors, torch.Tensor]:
    blocks, exponents = (
        random(EXPERTS, OUTPUTS, INPUTS // 32, 16),
        random(EXPERTS, OUTPUTS, INPUTS // 32, low=100, high=140),
    )
    tensors = {f"{BASE}.gate_up_proj_blocks": blocks, f"{BASE}.gate_up_proj_scales": exponents}
    return tensors, convert_moe_packed_tensors(blocks, exponents)


def fp8(*shape: int) -> tuple[Tensors, torch.Tensor]:
    weight, scale = codes(EXPERTS, *shape), scales(EXPERTS, shape[0] // 32, shape[1] // 32)
    tensors = {f"{BASE}.gate_up_proj": weight, f"{BASE}.gate_up_proj_scale_inv": scale}
    return tensors, Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.bfloat16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "fp8 transposed"])
def test_experts_are_rows_of_the_dequantized_stack(tmp_path: Path, kind: str, interleaved: bool) -> None:
    transposed = kind != "fp8"
    tensors, dense = mxfp4() if kind == "mxfp4" else fp8(INPUTS, OUTPUTS) if transposed else fp8(OUTPUTS, INPUTS)
    stack = Stack("experts.gate_up_proj", ("experts.{}.gate_proj", "experts.{}.up_proj"), transposed, interleaved)
    seen = view(written(tmp_path, tensors), [stack])
    reader = RowReader(tmp_path)
    rows = dense.transpose(1, 2) if transposed else dense
    half = OUTPUTS // 2
    for expert in range(EXPERTS):
        for part, leaf in enumerate(("gate_proj", "up_proj")):
            found = torch.from_numpy(reader.values(seen.tensors[f"{BASE}.{expert}.{leaf}.weight"]))
            own = rows[expert, part::2] if interleaved else rows[expert, part * half : (part + 1) * half]
            assert torch.equal(found, own.float())
    whole = with_stacks(seen, [f"{BASE}.gate_up_proj"]).tensors[f"{BASE}.gate_up_proj"]
    assert torch.equal(torch.from_numpy(reader.values(whole)), dense.float())


@pytest.mark.parametrize(("model_type", "quantized"), [("gpt_oss", False), ("llama4_text", True)])
def test_a_result_of_mxfp4_experts_is_that_of_their_dequantized_copy(
    tmp_path: Path, model_type: str, quantized: bool
) -> None:
    packed, dense = mxfp4()
    attention = {
        f"model.layers.0.self_attn.{leaf}_proj.weight": torch.randn(
            64, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)
        )
        for leaf in "qkvo"
    }
    results = []
    for kind, experts in (("mxfp4", packed), ("bf16", {f"{BASE}.gate_up_proj": dense})):
        held = {name: (dtype_name(t), bits(t)) for name, t in (attention | experts).items()}
        source = write_checkpoint(tmp_path / kind, held, config={"model_type": model_type})
        w8a8.quantize(source, out := tmp_path / f"{kind}-w8a8", Options("compressed-tensors"))
        assert w8a8.verify(out, source).ok
        results.append(load_file(out / "model.safetensors"))
    made, wanted = results
    assert (f"{BASE}.0.gate_proj.weight_scale" in made) == quantized
    assert made.keys() == wanted.keys()
    assert all(made[name].dtype == value.dtype and made[name].equal(value) for name, value in wanted.items())
