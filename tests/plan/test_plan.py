import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import w8a8
from tests.checkpoints import LLAMA, Array, llama_tensors, write_checkpoint
from tests.named import NAMES, Family, headers, plan_from, plan_of
from w8a8.checkpoint import Checkpoint
from w8a8.errors import AlreadyQuantizedError, FusedGroupError, UsageError
from w8a8.formats import COMPATS, FORMATS
from w8a8.plan import Plan, module_name
from w8a8.quantization import Options

FORMAT_OPTIONS: list[dict[str, Any]] = [*({"format": f} for f in FORMATS), *({"compat": c} for c in COMPATS)]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def tiny(model_type: str = "llama", **extra: tuple[str, tuple[int, ...]]) -> Checkpoint:
    """Two layers of a decoder, headers only; `extra` tensors are named with `__` for a dot."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (32, 16))}
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{leaf}.weight": ("BF16", (16, 16)) for leaf in ATTENTION}
        tensors |= {f"model.layers.{i}.mlp.{p}_proj.weight": ("BF16", (16, 16)) for p in ("gate", "up", "down")}
        tensors[f"model.layers.{i}.input_layernorm.weight"] = ("BF16", (16,))
        tensors[f"model.layers.{i}.self_attn.q_proj.bias"] = ("BF16", (16,))
    tensors |= {name.replace("__", "."): value for name, value in extra.items()}
    return headers(tensors, {"model_type": model_type})


def quantized(plan: Plan) -> set[str]:
    return {module_name(d.tensor.name) for d in plan.decisions if d.quantize}


# --- --include and --exclude ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("glob", ["model.layers.0.*", "model.layers.0.*.weight", "*.0.*"])
def test_exclude_takes_a_layer_out_by_tensor_or_module_name(glob: str) -> None:
    plan = plan_of(tiny(), exclude=[glob])
    assert quantized(plan) == {m for m in quantized(plan_of(tiny())) if ".1." in m}
    assert {f"model.layers.0.self_attn.{leaf}" for leaf in ATTENTION} <= set(plan.exclude)
    reasons = {
        d.reason for d in plan.decisions if "layers.0" in d.tensor.name and d.tensor.name.endswith("_proj.weight")
    }
    assert reasons == {f"--exclude {glob}"}


@pytest.mark.parametrize("glob", ["fusion", "fusion.weight", "fus*"])
def test_include_adds_a_linear_layer_the_rules_leave_alone(glob: str) -> None:
    plan = plan_of(tiny(fusion__weight=("F16", (32, 16))), include=[glob])
    assert "fusion" in quantized(plan)
    assert plan.exclude == ("lm_head",)
    assert next(d.reason for d in plan.decisions if d.tensor.name == "fusion.weight") == f"--include {glob}"


@pytest.mark.parametrize("options", FORMAT_OPTIONS)
@pytest.mark.parametrize("globs", [["lm_head"], ["lm_*"], ["*.mlp.gate"], ["*.mlp.gate.weight"], ["*_proj", "lm_head"]])
def test_including_what_no_engine_loads_is_an_error_that_says_why(globs: list[str], options: dict[str, Any]) -> None:
    checkpoint = tiny(lm_head__weight=("BF16", (32, 16)), model__layers__0__mlp__gate__weight=("BF16", (4, 16)))
    with pytest.raises(UsageError, match=r"(lm_head|gate)\.weight cannot be quantized, since vLLM keeps"):
        plan_of(checkpoint, **options, include=globs)


def test_a_wide_include_passes_over_biases_norms_embeddings_and_the_output_layer() -> None:
    plan = plan_of(tiny(lm_head__weight=("BF16", (32, 16)), fusion__weight=("BF16", (16, 16))), include=["*"])
    assert quantized(plan) == quantized(plan_of(tiny())) | {"fusion"}
    assert next(d.reason for d in plan.decisions if d.component == "lm_head").startswith("vLLM keeps output layers")


def test_exclude_wins_over_include() -> None:
    plan = plan_of(tiny(fusion__weight=("BF16", (32, 16))), include=["fusion"], exclude=["fusion"])
    assert "fusion" not in quantized(plan)
    assert plan.exclude == ("fusion", "lm_head")


def test_globs_may_overlap() -> None:
    plan = plan_of(tiny(), exclude=["*.mlp.*", "*.down_proj"])
    assert not any(".mlp." in module for module in quantized(plan))


def test_excluding_what_is_left_alone_anyway_is_no_mistake() -> None:
    assert quantized(plan_of(tiny(), exclude=["*embed_tokens*"])) == quantized(plan_of(tiny()))


@pytest.mark.parametrize(
    "globs",
    [
        {"exclude": ["*.c_attn"]},
        {"exclude": ["*.mlp.*", "model.layers.2.*"]},
        {"include": ["*.c_attn"]},
        {"include": ["*layernorm*"]},
        {"include": ["*.q_proj.bias"]},
        {"include": ["*embed_tokens*"]},
        {"include": ["*.empty"]},
    ],
)
def test_a_glob_that_can_have_no_effect_is_an_error_naming_it(globs: dict[str, Any]) -> None:
    ((option, values),) = globs.items()
    with pytest.raises(UsageError) as caught:
        plan_of(tiny(model__empty__weight=("BF16", (0, 16))), **globs)
    assert f"--{option} {values[-1]!r} matches no" in str(caught.value)


def test_including_integers_is_an_error_that_names_the_dtype() -> None:
    with pytest.raises(UsageError, match=r"router\.weight is I64; only BF16, F16 and F32"):
        plan_of(tiny(model__router__weight=("I64", (4, 16))), include=["*.router"])


# --- fused groups ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leaf", "group"),
    [
        *(
            (leaf, "self_attn.q_proj, model.layers.1.self_attn.k_proj, model.layers.1.self_attn.v_proj")
            for leaf in "qkv"
        ),
        *((leaf, "mlp.gate_proj, model.layers.1.mlp.up_proj") for leaf in ("gate", "up")),
    ],
)
def test_excluding_one_member_of_a_fused_group_is_refused_with_the_whole_group(leaf: str, group: str) -> None:
    with pytest.raises(FusedGroupError) as caught:
        plan_of(tiny(), exclude=[f"model.layers.1.*.{leaf}_proj"])
    assert f"model.layers.1.{group} as one layer" in str(caught.value)
    assert f"--exclude model.layers.1.*.{leaf}_proj" in str(caught.value)


def test_half_of_what_qwen3_5_fuses_in_linear_attention_is_refused() -> None:
    family = Family.load("qwen3_5")
    with pytest.raises(FusedGroupError, match=r"in_proj_qkv, .*in_proj_z as one layer"):
        plan_of(family.checkpoint, exclude=["*.layers.0.linear_attn.in_proj_z"])
    with pytest.raises(FusedGroupError, match=r"in_proj_b, .*in_proj_a as one layer"):
        plan_of(family.checkpoint, include=["*.layers.0.linear_attn.in_proj_a"])
    both = plan_of(family.checkpoint, include=["*.layers.0.linear_attn.in_proj_[ab]"])
    assert sum(d.quantize for d in both.decisions) == len(family.quantized) + 2


@pytest.mark.parametrize("globs", [["*.o_proj"], ["*.down_proj"], ["*.[qkv]_proj"], ["*.gate_proj", "*.up_proj"]])
def test_layers_that_stand_alone_and_whole_groups_can_be_excluded(globs: list[str]) -> None:
    left = set(plan_of(tiny(), exclude=globs).exclude) - {"lm_head"}
    assert left
    assert left == quantized(plan_of(tiny())) - quantized(plan_of(tiny(), exclude=globs))


def test_a_layer_whose_keys_serve_as_values_is_quantized_without_a_v_proj() -> None:
    family = Family.load("gemma4")
    base = "model.language_model.layers.5.self_attn"
    assert f"{base}.v_proj.weight" not in family.kinds
    plan = plan_of(family.checkpoint)
    assert {f"{base}.q_proj", f"{base}.k_proj"} <= quantized(plan)
    assert not any(name.startswith(base) for name in plan.exclude)


def test_excluding_such_a_layer_lists_the_v_proj_that_engines_ask_for() -> None:
    family = Family.load("gemma4")
    base = "model.language_model.layers.5.self_attn"
    plan = plan_of(family.checkpoint, exclude=[f"{base}.[qk]_proj"])
    assert [n for n in plan.exclude if n.startswith(base)] == [f"{base}.{p}_proj" for p in "kqv"]
    with pytest.raises(FusedGroupError, match=r"q_proj, .*k_proj as one layer"):
        plan_of(family.checkpoint, exclude=[f"{base}.k_proj"])


def test_a_tied_lm_head_is_excluded_though_the_file_has_none() -> None:
    assert plan_of(tiny()).exclude == ("lm_head",)
    assert plan_of(tiny(language_model__lm_head__weight=("BF16", (32, 16)))).exclude == ("language_model.lm_head",)


# --- already quantized ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
        {"quantization_config": "int8"},
    ],
)
def test_a_source_that_says_it_is_quantized_is_refused(config: dict[str, Any]) -> None:
    checkpoint = headers({"model.layers.0.mlp.up_proj.weight": ("BF16", (8, 8))}, {"model_type": "llama", **config})
    with pytest.raises(AlreadyQuantizedError, match=r"quant_method (fp8|compressed-tensors|gptq|unknown)"):
        plan_of(checkpoint)


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3"])
def test_a_source_that_holds_8_bit_weights_is_refused(dtype: str) -> None:
    with pytest.raises(AlreadyQuantizedError, match=rf"mlp\.new\.weight is {dtype}"):
        plan_of(tiny(mlp__new__weight=(dtype, (8, 8))))


def test_a_source_that_holds_scales_is_refused() -> None:
    with pytest.raises(AlreadyQuantizedError, match=r"up_proj\.weight_scale exists already"):
        plan_of(tiny(model__layers__0__mlp__up_proj__weight_scale=("F32", (16,))))


# --- the plan as a value --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", FORMAT_OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_survives_json(name: str, options: dict[str, Any]) -> None:
    plan = plan_of(Family.load(name).checkpoint, **options, metadata={"w8a8_source": "ünïcode"})
    again = plan_from(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()


@pytest.mark.parametrize("options", FORMAT_OPTIONS)
def test_the_same_source_gives_the_same_plan(llama: Path, options: dict[str, Any]) -> None:
    first, second = w8a8.dry_run(llama, Options(**options)), w8a8.dry_run(llama, Options(**options))
    assert first == second
    assert first.fingerprint() == second.fingerprint()


def test_what_changes_the_result_changes_the_fingerprint(llama: Path) -> None:
    plans = [w8a8.dry_run(llama, Options(**options)) for options in FORMAT_OPTIONS]
    plans.append(w8a8.dry_run(llama, Options(exclude=["*.o_proj"])))
    assert len({plan.fingerprint() for plan in plans}) == len(plans)


@pytest.mark.parametrize("options", FORMAT_OPTIONS)
def test_bytes_out_is_what_the_result_takes_on_disk(options: dict[str, Any], tmp_path: Path) -> None:
    odd: dict[str, tuple[str, Array]] = {
        "model.layers.0.one.weight": ("BF16", np.ones((3, 5), np.float32)),
        "ids": ("I64", np.arange(3)),
    }
    source = write_checkpoint(tmp_path / "source", {**odd, **llama_tensors(), "x.flag": ("BOOL", np.ones(3, np.uint8))})
    result = w8a8.quantize(source, tmp_path / "out", Options(include=["*.one"], **options))
    plan = result.plan
    assert plan == w8a8.dry_run(source, Options(include=["*.one"], **options))
    assert plan.bytes_out == sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert plan.bytes_in == Checkpoint.open(source).nbytes
    assert plan.ratio == Checkpoint.open(tmp_path / "out").nbytes / plan.bytes_in


def test_components_add_up_to_the_whole() -> None:
    plan = plan_of(Family.load("gemma4_e2b").checkpoint)
    rows = plan.components()
    assert sum(row.tensors for row in rows) == len(plan.decisions)
    assert sum(row.bytes_in for row in rows) == plan.bytes_in
    assert sum(row.bytes_out for row in rows) == sum(shard.data_bytes for shard in plan.shards)
    assert [row.quantized for row in rows] == sorted((row.quantized for row in rows), reverse=True)
    assert {row.component for row in rows if row.quantized} == {"attention", "mlp"}


def test_the_config_is_the_sources_with_one_key_more(llama: Path) -> None:
    plan = w8a8.dry_run(llama)
    config = dict(plan.config)
    assert config.pop("quantization_config")["quant_method"] == "quark"
    assert config == LLAMA


@pytest.mark.parametrize("options", FORMAT_OPTIONS)
def test_planning_reads_no_weight(options: dict[str, Any], tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "a" / "llama", llama_tensors())
    hollow = write_checkpoint(tmp_path / "b" / "llama", llama_tensors())
    file = hollow / "model.safetensors"
    size = file.stat().st_size
    start = Checkpoint.open(hollow).shards[0].tensors[0].offset
    with file.open("r+b") as out:  # the header stays, the data becomes a hole
        out.truncate(start)
        out.truncate(size)
    assert not any(file.read_bytes()[start:])
    assert w8a8.dry_run(hollow, Options(**options)) == w8a8.dry_run(whole, Options(**options))


def test_a_plan_can_be_made_where_there_are_no_files_at_all() -> None:
    checkpoint = tiny()
    assert not checkpoint.path.exists()
    assert plan_of(checkpoint).shards[0].data_bytes > 0


# --- a result that is larger than its source ------------------------------------------------------------------------


def mxfp4_experts() -> Checkpoint:
    """gpt_oss as it is published, tiny: experts in MXFP4, attention in BF16."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.layers.0.self_attn.q_proj.weight": ("BF16", (32, 32))}
    for leaf, rows in (("gate_up_proj", 64), ("down_proj", 32)):
        stack = f"model.layers.0.mlp.experts.{leaf}"
        tensors |= {f"{stack}_blocks": ("U8", (4, rows, 1, 16)), f"{stack}_scales": ("U8", (4, rows, 1))}
        tensors[f"{stack}_bias"] = ("BF16", (4, rows))
    return headers(tensors, {"model_type": "gpt_oss"})


def test_a_result_larger_than_its_source_is_a_warning_that_says_why() -> None:
    plan = plan_of(mxfp4_experts())
    assert plan.ratio > 2
    kept, growth = plan.warnings
    why = "vLLM's loader for gpt_oss transposes every expert's matrix"
    assert kept.startswith(f"the experts of gpt_oss are left alone: {why}")
    sizes = f"{plan.ratio * plan.bytes_in / 1000:.1f} kB > {plan.bytes_in / 1000:.1f} kB"
    assert growth.startswith(f"OUT will be larger than SRC, {sizes}, because SRC is quantized already (MXFP4)")
    assert f"what is left alone is stored dequantized: experts ({why}" in growth


def test_int4_grows_to_int8() -> None:
    layers = {f"model.layers.0.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.weight_packed": ("I32", (64, 8)) for name in layers}
    tensors |= {f"{name}.weight_scale": ("BF16", (64, 1)) for name in layers}
    tensors |= {f"{name}.weight_shape": ("I64", (2,)) for name in layers}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    (growth,) = plan_of(headers(tensors, {**LLAMA, "quantization_config": scheme})).warnings
    assert growth.startswith("OUT will be larger than SRC")
    assert growth.endswith("INT8 takes 8 bits a weight")


def test_nothing_is_said_of_a_result_that_is_smaller() -> None:
    assert plan_of(tiny()).warnings == ()
