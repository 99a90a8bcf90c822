"""Experts, latents and states: what `fit` says of them, and what it says it cannot count."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.memory.reference import TENSORS, family, family_in_int8
from tests.named import headers
from w8a8.checkpoint import Checkpoint
from w8a8.machine import describe
from w8a8.memory import Fit, fit, ram_needed
from w8a8.memory.layers import State
from w8a8.memory.model import Experts, Model
from w8a8.memory.weights import weights_per_gpu
from w8a8.memory.working import expert_bytes


def changed(checkpoint: Checkpoint, *, rename: tuple[str, str] = ("", ""), **config: Any) -> Checkpoint:
    """The checkpoint with a part of its tensors' names renamed, and entries of its config changed."""
    tensors = {re.sub(*rename, name) if rename[0] else name: t for name, t in checkpoint.tensors.items()}
    return headers({n: (t.dtype, t.shape) for n, t in tensors.items()}, {**checkpoint.config, **config})


def in_mxfp4(checkpoint: Checkpoint) -> Checkpoint:
    """gpt_oss as it is published: 32 values in 16 bytes and a scale."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in checkpoint.tensors.items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            experts, columns, rows = tensor.shape
            tensors[f"{name}_blocks"] = ("U8", (experts, rows, columns // 32, 16))
            tensors[f"{name}_scales"] = ("U8", (experts, rows, columns // 32))
        else:
            tensors[name] = (tensor.dtype, tensor.shape)
    return headers(tensors, {**checkpoint.config, "quantization_config": {"quant_method": "mxfp4"}})


def in_gptq(checkpoint: Checkpoint) -> Checkpoint:
    """Its linear layers in 4 bits, in groups of 16."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith("proj.weight"):
            module, (out, columns) = name.removesuffix(".weight"), tensor.shape
            tensors[f"{module}.qweight"] = ("I32", (columns // 8, out))
            tensors[f"{module}.qzeros"] = ("I32", (columns // 16, out // 8))
            tensors[f"{module}.scales"] = ("F16", (columns // 16, out))
        else:
            tensors[name] = (tensor.dtype, tensor.shape)
    method = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    return headers(tensors, {**checkpoint.config, "quantization_config": method})


def uncounted(found: Fit) -> list[str]:
    return [notice for notice in found.notices if notice.startswith("not counted")]


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_nothing_of_a_known_model_is_left_uncounted(name: str) -> None:
    found = fit(family(name), describe("8GiB"))
    assert uncounted(found) == []
    assert ram_needed(family(name), 64) > found.weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe", Experts(32, 2)), ("mixtral", Experts(96, 2)), ("granitemoe", Experts(96, 2)),
        ("gpt_oss", Experts(96, 2)), ("llama4_text", Experts(32, 1)), ("ernie4_5_moe", Experts(32, 2)),
        ("falcon_h1", None),
    ],
)  # fmt: skip
def test_experts_are_measured_however_they_are_stored(name: str, expected: Experts | None) -> None:
    assert Model.read(family(name)).experts == expected


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoehybrid", "deepseek_v3", "mixtral"])
def test_experts_in_int8_take_half_and_their_scales(name: str) -> None:
    wide, narrow = Model.read(family(name)), Model.read(family_in_int8(name))
    experts = [t for t in wide.checkpoint.tensors.values() if t.name in wide.routed]
    scales = [t for t in narrow.checkpoint.tensors.values() if t.name in narrow.routed and t.dtype == "F32"]
    held = [t for t in narrow.checkpoint.tensors.values() if t.name in narrow.routed]
    assert experts
    assert scales
    assert sum(t.nbytes for t in held) == sum(t.nbytes for t in experts) // 2 + sum(t.nbytes for t in scales)


def test_a_latent_is_kept_once_on_every_gpu() -> None:
    one, four = (fit(family("deepseek_v3"), describe(f"{count}x8GiB")) for count in (1, 4))
    assert one.kv_per_token == four.kv_per_token == 2 * (32 + 8) * 2
    assert four.tensor_parallel == 4


def test_a_quantized_projection_from_latents_is_kept_in_two_bytes_besides() -> None:
    model = Model.read(family_in_int8("deepseek_v3"))
    without = changed(family_in_int8("deepseek_v3"), rename=(r"kv_b_proj", "kv_up"))
    assert weights_per_gpu(model, 1) - weights_per_gpu(Model.read(without), 1) == 2 * 2 * 128 * 32


def test_the_embedded_engine_keeps_latents_and_makes_keys_and_values_of_one_layer_from_them() -> None:
    one, two = (ram_needed(family("deepseek_v3"), context) for context in (64, 128))
    kept, made = 2 * (32 + 8) * 2, (128 + 4 * 8) * 2
    assert two - one == 64 * (kept + made + 6 * 64 + 7 * (96 + 2 * 32))


def test_a_state_does_not_grow_with_the_context() -> None:
    short, long = (fit(family("mamba2", context=4096), describe("8GiB"), context=context) for context in (64, 4096))
    assert short.kv == long.kv > 0
    assert (short.kv_per_token, short.state_per_sequence) == (0, 2 * (192 * 3 * 2 + 128 * 16 * 2))


def test_groups_are_copied_to_every_gpu_and_must_else_divide() -> None:
    state = State(channels=128, inputs=3, recurrent=2048, heads=8, groups=1, per_group=32)
    assert state.nbytes(1) == (128 + 32) * 3 * 2 + 2048 * 2
    assert state.nbytes(4) == (128 // 4 + 32) * 3 * 2 + 2048 * 2 // 4
    assert state.splits(4)
    assert fit(family("mamba2"), describe("4x8GiB")).tensor_parallel == 2  # it has 2 groups


def test_gpus_must_divide_an_expert() -> None:
    narrow = changed(family("qwen3_moe"))
    tensors = {
        n: (t.dtype, tuple(30 if d == 32 and "experts" in n else d for d in t.shape)) for n, t in narrow.tensors.items()
    }
    assert fit(headers(tensors, narrow.config), describe("4x8GiB")).tensor_parallel == 2


def test_the_kernels_of_experts_have_workspaces_for_a_whole_batch() -> None:
    model = Model.read(family("qwen3_moe"))
    outputs, inputs = 2 * 64 + 2 * 64, 32  # 64 values in 2 bytes of either matrix; 32 inputs of the second in INT8
    assert expert_bytes(model, 1, 100) == 100 * (2 * (outputs + inputs) + 64)
    assert expert_bytes(model, 2, 100) < expert_bytes(model, 1, 100)
    assert expert_bytes(Model.read(family("llama")), 1, 100) == 0


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        (changed(family("jamba"), rename=("conv1d", "lag")), "state of layers 0, 1, 3,"),
        (changed(family("qwen3_next"), rename=("in_proj|out_proj", "mix")), "state of layer 0,"),
        (changed(family("llama"), rename=("self_attn.k_proj", "self_attn.odd_proj")), "state of layers 0, 1,"),
        (changed(family("llama"), layer_types=["linear_attention", "full_attention"]), "state of layer 0,"),
        (changed(family("deepseek_v3"), rename=("self_attn.q_b_proj", "self_attn.indexer.wq_b")), "indexer"),
        (changed(family("llama"), rename=("self_attn.o_proj", "encoder_attn.k_proj")), "layers 0, 1: more than one"),
        (changed(family("qwen3_moe"), num_experts_per_tok=None), "more than one expert"),
        (in_mxfp4(family("gpt_oss")), "MXFP4"),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_said(checkpoint: Checkpoint, said: str) -> None:
    (notice,) = uncounted(fit(checkpoint, describe("8GiB")))
    assert said in notice


def test_layers_behind_the_last_one_are_not_loaded() -> None:
    whole = family("deepseek_v3", num_hidden_layers=1, num_nextn_predict_layers=1)
    assert weights_per_gpu(Model.read(whole), 1) < weights_per_gpu(Model.read(family("deepseek_v3")), 1)
    assert len(Model.read(whole).layers) == 1


def test_a_source_in_blocks_of_fp8_is_counted_as_it_is_stored_and_split_with_its_scales() -> None:
    dense, tensors = family("deepseek_v3"), {}
    for name, tensor in dense.tensors.items():
        matrix = "proj" in name
        tensors[name] = ("F8_E4M3" if matrix else "BF16", tensor.shape)
        if matrix:
            tensors[f"{name}_scale_inv"] = ("F32", tuple(-(-side // 16) for side in tensor.shape))
    blocks = {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3", "activation_scheme": "dynamic"}
    model = Model.read(headers(tensors, {**dense.config, "quantization_config": blocks}))
    assert (model.experts, model.layers) == (Experts(32, 2), Model.read(dense).layers)
    experts = sum(t.nbytes for t in model.checkpoint.tensors.values() if t.name in model.routed)
    assert experts == 8 * 3 * (64 * 32 + 2 * 4 * 4)
    whole, half = (weights_per_gpu(model, gpus) for gpus in (1, 2))
    kept = [t for t in model.checkpoint.tensors.values() if re.search(r"norm|_a_proj|mlp\.gate\.", t.name)]
    assert whole - half == (whole - sum(t.numel * 4 if "bias" in t.name else t.nbytes for t in kept)) // 2


@pytest.mark.parametrize(("name", "make"), [("gpt_oss", in_mxfp4), ("qwen3_moe", in_gptq)])
def test_a_source_in_packed_integers_is_read_by_its_logical_tensors_and_counted_as_it_is_stored(
    name: str, make: Callable[[Checkpoint], Checkpoint]
) -> None:
    dense, packed = Model.read(family(name)), Model.read(make(family(name)))
    assert (packed.layers, packed.experts, packed.intermediate) == (dense.layers, dense.experts, dense.intermediate)
    assert weights_per_gpu(packed, 1) == sum(t.nbytes for t in packed.checkpoint.tensors.values())
    experts = sum(t.nbytes for t in packed.checkpoint.tensors.values() if t.name in packed.routed)
    assert weights_per_gpu(packed, 1) - weights_per_gpu(packed, 2) > 0.45 * experts
    (said,) = [notice for notice in fit(packed.checkpoint, describe("8GiB")).notices if "quantized already" in notice]
    assert "as it is stored" in said
