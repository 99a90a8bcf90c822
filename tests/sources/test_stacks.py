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
from w8a8.errors import SourceError
from w8a8.quantization import Options
from w8a8.sources.experts import Stack, join
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


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_in_any_files_are_joined(tmp_path: Path, transposed: bool, interleaved: bool) -> None:
    parts = ("experts.{}.gate_proj", "experts.{}.up_proj")
    stacks = [
        Stack("experts.gate_up_proj", parts, transposed, interleaved),
        Stack("experts.gate_up_proj_bias", tuple(f"{part}.bias" for part in parts), interleaved=interleaved),
    ]
    whole = {
        f"{BASE}.gate_up_proj": torch.randn(EXPERTS, INPUTS, OUTPUTS)
        if transposed
        else torch.randn(EXPERTS, OUTPUTS, INPUTS),
        f"{BASE}.gate_up_proj_bias": torch.randn(EXPERTS, OUTPUTS),
    }
    seen = view(written(tmp_path / "whole", whole), stacks)
    reader = RowReader(tmp_path / "whole")
    apart = {name: torch.from_numpy(reader.values(t)).reshape(t.shape) for name, t in seen.tensors.items()}
    assert len(apart) == 4 * EXPERTS
    backwards = dict(reversed(apart.items()))
    joined = join(view(written(tmp_path / "apart", backwards, shards=3)), stacks)
    assert not joined.tensors
    reader = RowReader(tmp_path / "apart")
    for each in (joined for shard in joined.shards for joined in shard.joined):
        wanted = whole.pop(each.name)
        assert each.shape == wanted.shape
        for number, expert in enumerate(wanted):
            assert bytes(reader.expert(each, number)) == expert.numpy().tobytes()
    assert not whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {f"{i}.up_proj": None for i in range(3)},
            r"experts\.0\.up_proj\.weight is missing, where .*experts\.0\.gate_proj.* is F32 \[4, 8\]",
        ),
        ({"2.up_proj": torch.ones(4, 9)}, r"experts\.2\.up_proj\.weight is F32 \[4, 9\]"),
        ({"0.up_proj": torch.ones(4, 8).half()}, r"experts\.0\.up_proj\.weight is F16 \[4, 8\]"),
    ],
)
def test_experts_that_make_no_stack_are_named(
    tmp_path: Path, change: dict[str, torch.Tensor | None], said: str
) -> None:
    parts = {f"{i}.{leaf}": torch.ones(4, 8) for i in range(3) for leaf in ("gate_proj", "up_proj")} | change
    seen = view(written(tmp_path, {f"{BASE}.{name}.weight": t for name, t in parts.items() if t is not None}))
    with pytest.raises(SourceError, match=said):
        join(seen, [Stack("experts.gate_up_proj", ("experts.{}.gate_proj", "experts.{}.up_proj"))])


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
