"""Architectures whose layers engines know by other names than the file's, or fuse with layers that stay in BF16.

The names are those of small checkpoints that transformers 5.23 saves; `tests/engines/test_architectures.py`
loads such in stock vLLM.
"""

import re

import pytest

from tests.named import headers, plan_of
from w8a8.errors import FusedGroupError, NothingToQuantizeError, UsageError
from w8a8.formats import FORMATS, detect
from w8a8.plan import Plan, architecture_of, module_name
from w8a8.plan.architectures import known

LAYERS = "model.layers.0", "model.layers.1"


def plan(
    model_type: str,
    *matrices: str,
    format: str = "quark",  # noqa: A002
    exclude: tuple[str, ...] = (),
    stacks: tuple[str, ...] = (),
) -> Plan:
    """The plan for `matrices`, named from the layer on or whole, each once a layer; `stacks` have three dimensions."""
    shapes = dict.fromkeys(matrices, (16, 16)) | dict.fromkeys(stacks, (4, 16, 16))
    tensors = {}
    for name, shape in shapes.items():
        for layer in LAYERS if not name.startswith("model.") else ("",):
            tensors[f"{layer}.{name}.weight".lstrip(".")] = ("BF16", shape)
    return plan_of(headers(tensors, {"model_type": model_type}), format, exclude=exclude)


def quantized(made: Plan) -> set[str]:
    return {module_name(d.tensor.name).removeprefix("model.layers.") for d in made.decisions if d.quantize}


QKVO = tuple(f"self_attn.{p}_proj" for p in "qkvo")


STACKS = "block_sparse_moe.input_linear", "block_sparse_moe.output_linear"
ASKED = tuple(f"experts.{expert}.{leaf}_proj" for expert in range(4) for leaf in ("gate", "up", "down"))
"""The names by which vLLM asks for the experts of granitemoe."""


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_quantized_by_the_names_that_vllm_gives_them(name: str) -> None:
    made = plan("granitemoe", *QKVO, "block_sparse_moe.router.layer", format=name, stacks=STACKS)
    scheme = detect(made.config)
    experts = {f"{layer}.block_sparse_moe.{leaf}" for layer in "01" for leaf in ASKED}
    assert quantized(made) == experts | {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}
    assert not any(scheme.leaves_alone(f"model.layers.{module}") for module in quantized(made))
    assert not scheme.leaves_alone("model.layers.0.block_sparse_moe.experts")
    assert scheme.leaves_alone("model.layers.0.block_sparse_moe.router.layer")
    assert not any("experts" in entry for entry in scheme.excludes)


@pytest.mark.parametrize("name", FORMATS)
def test_experts_are_excluded_by_the_names_that_vllm_gives_them(name: str) -> None:
    made = plan(
        "granitemoe", *QKVO, "block_sparse_moe.router.layer", format=name, exclude=("*.experts.*",), stacks=STACKS
    )
    scheme = detect(made.config)
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}
    for asked in ("experts", *ASKED, "input_linear", "output_linear", "router.layer"):
        assert scheme.leaves_alone(f"model.layers.0.block_sparse_moe.{asked}"), asked
    assert not any(scheme.leaves_alone(f"model.layers.{module}") for module in quantized(made))


@pytest.mark.parametrize("name", FORMATS)
def test_the_experts_of_one_layer_can_be_excluded(name: str) -> None:
    made = plan("granitemoe", *QKVO, format=name, exclude=("*.layers.1.*.experts.*",), stacks=STACKS)
    scheme = detect(made.config)
    assert {name for name in quantized(made) if "experts" in name} == {f"0.block_sparse_moe.{leaf}" for leaf in ASKED}
    for asked in ("experts", *ASKED):
        assert scheme.leaves_alone(f"model.layers.1.block_sparse_moe.{asked}"), asked
        # vLLM's name for it, where a model has a vision tower besides.
        assert scheme.leaves_alone(f"language_model.model.layers.1.block_sparse_moe.{asked}"), asked
        assert not scheme.leaves_alone(f"model.layers.0.block_sparse_moe.{asked}"), asked
        assert not scheme.leaves_alone(f"model.layers.11.block_sparse_moe.{asked}"), asked
    assert len([entry for entry in scheme.excludes if "experts" in entry]) == 2


@pytest.mark.parametrize("excluded", ["*.layers.1.*.experts.3.*", "*.up_proj"])
def test_excluding_some_of_a_layers_experts_is_refused_by_the_name_of_all(excluded: str) -> None:
    with pytest.raises(FusedGroupError, match=r"load all of model\.layers\.\d\.block_sparse_moe\.experts as one layer"):
        plan("granitemoe", *QKVO, exclude=(excluded,), stacks=STACKS)


def test_layers_behind_the_last_one_are_mtp_heads() -> None:
    leaves = ("self_attn.o_proj", "mlp.experts.0.up_proj", "mlp.experts.0.gate_proj", "mlp.experts.0.down_proj")
    names = [f"model.layers.{layer}.{leaf}.weight" for layer in range(3) for leaf in (*leaves, "mlp.gate")]
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    made = plan_of(headers(dict.fromkeys(names, ("BF16", (16, 16))), config), "compressed-tensors")
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in leaves}
    assert {d.component for d in made.decisions if ".layers.2." in d.tensor.name} == {"mtp head", "router"}
    scheme = detect(made.config)
    assert all(scheme.leaves_alone(f"model.layers.2.{leaf}") for leaf in (*leaves, "mlp.gate"))
    assert not any(scheme.leaves_alone(f"model.layers.1.{leaf}") for leaf in leaves)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tower_is_excluded_whatever_vllm_fuses_in_it(name: str) -> None:
    tower = [f"model.visual.blocks.0.{leaf}" for leaf in ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj")]
    made = plan("glm_ocr", *QKVO, *tower, "model.visual.merger.gate_proj", format=name)
    scheme = detect(made.config)
    for asked in ("visual.blocks.0.attn.qkv_proj", "visual.blocks.0.mlp.gate_up_proj", "visual.merger.gate_up_proj"):
        assert scheme.leaves_alone(asked), asked
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}


def test_encoders_and_adapters_of_phi4_multimodal_stay_in_bf16() -> None:
    image = [
        f"model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0.{leaf}" for leaf in (*QKVO, "mlp.fc1")
    ]
    speech = [f"model.embed_tokens_extend.audio_embed.encoder.encoders.0.{leaf}" for leaf in (*QKVO, "mlp.fc1")]
    projections = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    lora = [f"{leaf}.lora_{side}.{kind}" for leaf in projections for side in "AB" for kind in ("vision", "speech")]
    expected = {f"{layer}.{leaf}" for layer in "01" for leaf in projections}
    assert quantized(plan("phi4_multimodal", *projections, *image, *speech)) == expected
    based = [f"{leaf}.base_layer" for leaf in projections]
    assert quantized(plan("phi4mm", *based, *lora, *image, *speech)) == {f"{leaf}.base_layer" for leaf in expected}


@pytest.mark.parametrize(
    "tower",
    [
        "model.image_newline.layers.0",
        "model.speech_model.layers.0",
        "model.embed_tokens_extend.image_embed.img_processor.encoder.layers.0",
        "model.whisper.layers.0",
        "model.perceiver_resampler.layers.0",
        "model.talker.model.layers.0",
        "model.encoder.layers.0",
    ],
)
def test_what_is_no_text_decoder_is_kept_whatever_it_is_called(tower: str) -> None:
    made = plan("brand_new", *QKVO, *(f"{tower}.{leaf}" for leaf in QKVO))
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}


def test_what_vllm_fuses_with_b_proj_is_quantized_with_it() -> None:
    gates = [f"self_attn.{leaf}_proj" for leaf in ("b", "f_a", "f_b", "g_a", "g_b")]
    latent = [f"model.layers.2.self_attn.{leaf}" for leaf in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
    mlp = [f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")]
    made = plan("kimi_linear", *QKVO, *gates, *latent, *mlp)
    every_layer = {f"{layer}.{leaf}" for layer in "01" for leaf in (*QKVO, *gates[:2], *mlp)}
    assert quantized(made) == every_layer | {name.removeprefix("model.layers.") for name in latent}
    for leaf in ("b_proj", "f_a_proj", "k_proj"):
        with pytest.raises(FusedGroupError, match=r"q_proj, .*b_proj, .*f_a_proj as one layer"):
            plan("kimi_linear", *QKVO, *gates, *mlp, exclude=(f"*.{leaf}",))
    fused = [f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "b", "f_a")]
    made = plan("kimi_linear", *QKVO, *gates, *mlp, exclude=tuple(f"*.{leaf}" for leaf in fused))
    asked = (*fused, "self_attn.in_proj_qkvgfab")
    assert all(detect(made.config).leaves_alone(f"model.layers.0.{leaf}") for leaf in asked)


def test_one_letter_projections_that_no_one_knows_are_left_alone() -> None:
    made = plan("brand_new", *QKVO, "self_attn.b_proj", "self_attn.g_proj")
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}


@pytest.mark.parametrize(
    ("model_type", "matrix", "why"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "it is a Conv1D layer, stored [in, out]"),
        ("openai-gpt", "transformer.h.0.mlp.c_fc", "it is a Conv1D layer, stored [in, out]"),
        ("mamba", "backbone.layers.0.mixer.in_proj", "vLLM keeps Mamba layers of the first version"),
        ("falcon_mamba", "backbone.layers.0.mixer.out_proj", "vLLM keeps Mamba layers of the first version"),
        ("glm5_next", "model.language_model.layers.0.self_attn.q_proj", "vLLM keeps the attention of glm5_next"),
    ],
)
def test_where_engines_take_nothing_in_int8_the_reason_is_said(model_type: str, matrix: str, why: str) -> None:
    tensors = {f"{matrix}.weight": ("BF16", (16, 16))}
    for include, error in (((), NothingToQuantizeError), ((matrix,), UsageError)):
        with pytest.raises(error, match=rf"{matrix}\.weight .*since {re.escape(why)}"):
            plan_of(headers(tensors, {"model_type": model_type}), include=include)


@pytest.mark.parametrize(
    ("model_type", "left", "included"),
    [
        ("gemma3n_text", "model.layers.0.per_layer_input_gate", True),
        ("kimi_linear", "model.layers.0.self_attn.f_b_proj", True),
        ("jamba", "model.layers.0.mamba.in_proj", False),
        ("deepseek_v4", "model.layers.0.attn.wo_a", False),
        ("deepseek_v4", "model.layers.0.attn.indexer.weights_proj", False),
        ("qwen4_exp", "model.language_model.layers.0.mlp_hyper_connection.input_mix_weight_up", False),
        ("inkling_text", "model.layers.0.mlp.shared_experts.up_proj", False),
    ],
)
def test_include_overrides_a_choice_but_not_what_engines_cannot_load(
    model_type: str, left: str, included: bool
) -> None:
    tensors = {f"{name}.weight": ("BF16", (16, 16)) for name in (left, "model.layers.0.mlp.experts.0.up_proj")}
    seen = headers(tensors, {"model_type": model_type})
    reasons = {decision.tensor.name: decision.reason for decision in plan_of(seen).decisions}
    table = architecture_of({"model_type": model_type})
    assert reasons[f"{left}.weight"] in (table.reasons if included else table.never).values()
    if included:
        assert any(d.quantize and d.tensor.name == f"{left}.weight" for d in plan_of(seen, include=[left]).decisions)
    else:
        with pytest.raises(UsageError, match=f"{left}.weight cannot be quantized, since"):
            plan_of(seen, include=[left])


def test_gpt_oss_is_written_in_the_format_that_vllm_loads_and_its_experts_as_it_takes_them() -> None:
    with pytest.raises(UsageError, match="give --format compressed-tensors"):
        plan("gpt_oss", *QKVO, stacks=("mlp.experts.gate_up_proj",))
    made = plan("gpt_oss", *QKVO, format="compressed-tensors", stacks=("mlp.experts.gate_up_proj",))
    assert quantized(made) == {f"{layer}.{leaf}" for layer in "01" for leaf in QKVO}
    assert made.warnings == (f"the experts of gpt_oss are left alone: {known()['gpt_oss'].never['experts']}",)
    assert detect(made.config).leaves_alone("model.layers.0.mlp.experts.0.gate_proj")
