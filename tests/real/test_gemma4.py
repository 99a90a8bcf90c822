"""Gemma 4 with its vision tower, small and random, as transformers writes it: dense, and mixture of experts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

import w8a8
from w8a8.quantization import Options

# Two sliding layers to one full one, which uses its keys as values and has no v_proj, as in the 31B.
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "vocab_size": 320,
    "vocab_size_per_layer_input": 320,
    "sliding_window": 16,
    "max_position_embeddings": 128,
}
EXPERTS: Mapping[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
    "pooling_kernel_size": 2,
}
TOKENS = {
    "image_token_id": 300,
    "boi_token_id": 301,
    "eoi_token_id": 302,
    "audio_token_id": 303,
    "boa_token_id": 304,
    "eoa_token_index": 305,
    "video_token_id": 306,
}
QUANTIZED = sum(7 if kind == "sliding_attention" else 6 for kind in LAYERS)
VARIANTS: Mapping[str, Mapping[str, Any]] = {"dense": {}, "experts": EXPERTS}


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    text = {**TEXT, **VARIANTS[request.param]}
    config = Gemma4Config(text_config=text, vision_config=VISION, audio_config=None, **TOKENS)
    return Gemma4ForConditionalGeneration(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def source(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma4") / "source"
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module", params=["quark", "compressed-tensors"])
def out(request: pytest.FixtureRequest, source: Path) -> Path:
    folder = source.with_name(request.param)
    w8a8.quantize(source, folder, Options(format=request.param))
    return folder


def tensors(folder: Path) -> dict[str, Any]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def quantized(folder: Path) -> set[str]:
    """The modules whose weight is INT8."""
    return {name.removesuffix(".weight") for name, tensor in tensors(folder).items() if tensor.dtype == torch.int8}


def linears(model: Any) -> set[str]:
    """Every linear layer of the model as transformers builds it, by the name its file gives it (here, the same)."""
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def experts(model: Any) -> dict[str, str]:
    """The matrices of the experts by the names that engines load, and the stacks that the source has instead."""
    if not model.config.text_config.enable_moe_block:
        return {}
    leaves = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    prefixes = [f"model.language_model.layers.{layer}.experts" for layer in range(len(LAYERS))]
    return {
        f"{prefix}.{expert}.{leaf}": f"{prefix}.{stack}"
        for prefix in prefixes
        for expert in range(EXPERTS["num_experts"])
        for leaf, stack in leaves.items()
    }


def test_verify_finds_nothing_wrong(model: Any, source: Path, out: Path) -> None:
    result = w8a8.verify(out, source)
    assert (result.problems, result.warnings) == ((), ())
    split = experts(model)
    assert len(result.tensors) == QUANTIZED + len(split)
    assert result.copied == len(tensors(source)) - QUANTIZED - len(set(split.values()))


def test_exactly_the_text_decoders_linear_layers_become_int8(model: Any, out: Path) -> None:
    decoder = {name for name in linears(model) if ".language_model.layers." in name and ".router." not in name}
    assert len(decoder) == QUANTIZED
    assert quantized(out) == decoder | experts(model).keys()


def test_keys_that_serve_as_values_are_quantized_once_and_no_v_proj_appears(source: Path, out: Path) -> None:
    assert json.loads((source / "config.json").read_text())["text_config"]["attention_k_eq_v"] is True
    full = [i for i, kind in enumerate(LAYERS) if kind == "full_attention"]
    for i in full:
        assert f"model.language_model.layers.{i}.self_attn.k_proj" in quantized(out)
        assert not any(f".layers.{i}.self_attn.v_proj" in name for name in tensors(out) if "language_model" in name)


def test_all_else_is_identical_the_vision_tower_its_projection_embeddings_norms_scalars(
    model: Any, source: Path, out: Path
) -> None:
    before, after, split = tensors(source), tensors(out), experts(model)
    kept = {name for name in before if name.removesuffix(".weight") not in quantized(out)} - set(split.values())
    for part in ("vision_tower.", "embed_vision.", "embed_tokens.", "layernorm", ".norm.", "_norm.", "layer_scalar"):
        assert any(part in name for name in kept), part
    for name in kept:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name].view(torch.int16), before[name].view(torch.int16)), name
    scales = {f"{module}.weight_scale" for module in quantized(out)}
    assert after.keys() == (before.keys() - set(split.values())) | {f"{name}.weight" for name in split} | scales


def test_every_linear_layer_left_alone_is_excluded_by_its_exact_name(model: Any, source: Path, out: Path) -> None:
    left = linears(model) - quantized(out)
    assert {"lm_head", "model.embed_vision.embedding_projection"} <= left
    assert {f"{name}.weight" for name in left - {"lm_head"}} <= tensors(source).keys()
    excludes = set(w8a8.inspect(out).excludes)
    assert left <= excludes
    assert not excludes & quantized(out)


def test_patterns_beside_the_exact_names_catch_no_quantized_layer(model: Any, out: Path) -> None:
    from w8a8.formats import detect

    scheme = detect(json.loads((out / "config.json").read_text()))
    assert {name for name in linears(model) if scheme.leaves_alone(name)} == linears(model) - quantized(out)


def test_routers_are_left_alone_and_each_expert_is_int8(model: Any, source: Path, out: Path) -> None:
    before, made, split = tensors(source), tensors(out), experts(model)
    assert {tensor.dtype for name, tensor in made.items() if ".router." in name} <= {torch.bfloat16}
    for name, stack in split.items():
        assert made[f"{name}.weight"].dtype == torch.int8
        rows, columns = before[stack].shape[1:]
        assert made[f"{name}.weight"].shape == (rows // (2 if stack.endswith("gate_up_proj") else 1), columns)


def test_the_model_with_dequantized_weights_predicts_nearly_the_same(model: Any, source: Path, out: Path) -> None:
    made = tensors(out)
    weights = {
        f"{name}.weight": made[f"{name}.weight"].float() * made[f"{name}.weight_scale"].float().reshape(-1, 1)
        for name in quantized(out)
    }
    for stack in sorted(set(experts(model).values())):
        prefix, _, leaf = stack.rpartition(".")
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        matrices = [
            [weights.pop(f"{prefix}.{e}.{part}.weight") for part in parts] for e in range(EXPERTS["num_experts"])
        ]
        weights[stack] = torch.stack([torch.cat(each) for each in matrices])
    reader = Gemma4ForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.arange(3, 35).reshape(1, -1)
    with torch.no_grad():
        reference = reader(input_ids=ids).logits
        logits = functional_call(reader, weights, kwargs={"input_ids": ids}).logits
    error = (logits - reference).norm() / reference.norm()
    # Measured: 0.10, and 0.25 with experts, where a little noise chooses another one (noise of BF16's size: 0.04 and
    # 0.13). Unrelated predictions are 1.4 apart.
    assert 0 < error < (0.5 if model.config.text_config.enable_moe_block else 0.2)
