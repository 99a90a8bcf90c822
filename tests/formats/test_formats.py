import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import w8a8
from tests.checkpoints import read_tensor
from tests.named import NAMES, Family, headers, plan_of, selection
from w8a8.checkpoint import Checkpoint, TensorSpec
from w8a8.errors import UsageError
from w8a8.formats import COMPATS, FORMATS, Selection, get_format
from w8a8.plan import module_name
from w8a8.quantization import Options


def ignored(entries: list[str], module: str) -> bool:
    """As vLLM and transformers match `ignore`: the exact name, or a pattern from the start."""
    return any(re.match(e[3:], module) if e.startswith("re:") else e == module for e in entries)


def quantized_modules(family: Family) -> set[str]:
    return {module_name(name) for name in family.quantized}


def test_both_formats_hold_the_same_codes_and_scales(llama: Path, tmp_path: Path) -> None:
    opened = []
    for name in FORMATS:
        w8a8.quantize(llama, tmp_path / name, Options(format=name))
        opened.append(Checkpoint.open(tmp_path / name))
    quark, compressed = opened
    assert quark.tensors.keys() == compressed.tensors.keys()
    for name, tensor in quark.tensors.items():
        twin = compressed.tensors[name]
        assert read_tensor(quark, tensor) == read_tensor(compressed, twin)
        assert tensor.dtype == twin.dtype
        if name.endswith(".weight_scale"):
            assert (tensor.dtype, len(tensor.shape)) == ("F32", 1)
            assert twin.shape == (*tensor.shape, 1)
        else:
            assert tensor.shape == twin.shape


@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_amax_over_127(name: str, llama: Path, tmp_path: Path) -> None:
    w8a8.quantize(llama, tmp_path / "out", Options(format=name))
    source, out = Checkpoint.open(llama), Checkpoint.open(tmp_path / "out")
    weight = "model.layers.0.mlp.down_proj.weight"
    raw = np.frombuffer(read_tensor(source, source.tensors[weight]), np.uint16).reshape(source.tensors[weight].shape)
    w = (raw.astype(np.uint32) << 16).view(np.float32)
    scale = np.frombuffer(read_tensor(out, out.tensors[f"{weight}_scale"]), np.float32)
    np.testing.assert_array_equal(scale, np.abs(w).max(axis=1) / np.float32(127))


def test_the_quark_config_is_the_one_our_reference_model_card_states() -> None:
    config = get_format("quark").quantization_config(selection(["a.q_proj"], ["lm_head", "b.c"]))
    assert config["quant_method"] == "quark"
    assert config["export"]["weight_format"] == "real_quantized"
    assert config["export"]["pack_method"] == "order"
    assert config["exclude"] == ["lm_head", "b.c"]
    weight, inputs = (config["global_quant_config"][part] for part in ("weight", "input_tensors"))
    for spec, axis, dynamic in ((weight, 0, False), (inputs, 1, True)):
        assert spec["dtype"] == "int8"
        assert spec["qscheme"] == "per_channel"
        assert spec["ch_axis"] == axis
        assert spec["symmetric"] is True
        assert spec["is_dynamic"] is dynamic
        assert spec["round_method"] == "half_even"


def test_the_quark_config_has_what_vllm_insists_on() -> None:
    config = get_format("quark").quantization_config(selection(["a.q_proj"], []))
    assert config["exclude"] == []
    assert config["export"]["kv_cache_group"] == []
    assert config["layer_type_quant_config"] == {}
    assert config["global_quant_config"]["output_tensors"] is None
    assert config["global_quant_config"]["bias"] is None


def test_the_compressed_tensors_config_says_int_quantized_w8a8() -> None:
    config = get_format("compressed-tensors").quantization_config(selection(["a.q_proj"], ["lm_head"]))
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "int-quantized")
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    weights, inputs = group["weights"], group["input_activations"]
    assert (weights["strategy"], weights["dynamic"]) == ("channel", False)
    assert (inputs["strategy"], inputs["dynamic"]) == ("token", True)
    for args in (weights, inputs):
        assert (args["num_bits"], args["type"], args["symmetric"]) == (8, "int", True)


@pytest.mark.parametrize("name", NAMES)
def test_exclude_names_every_linear_layer_left_alone_and_nothing_that_is_quantized(name: str) -> None:
    family = Family.load(name)
    exclude = set(plan_of(family.checkpoint, "quark").config["quantization_config"]["exclude"])
    assert family.linear_layers_left <= exclude
    assert not exclude & quantized_modules(family)
    # Beyond these: a tied lm_head, and routers that transformers builds as parameters.
    beyond = exclude - family.linear_layers_left - {"lm_head"}
    assert all(re.search(r"\.gate$|\brouter\b", entry.replace(r"\b", "")) for entry in beyond), beyond
    assert not any("experts" in entry for entry in exclude)


def test_quark_excludes_what_it_takes_for_a_linear_layer_by_name() -> None:
    shapes = {"h.ln_1": (8,), "h.norm": (8,), "h.fc": (8, 8), "h.conv": (8, 8, 3), "h.patch_embed": (8, 8)}
    copied = [TensorSpec(f"{name}.weight", "BF16", shape, "s", 0, 16) for name, shape in shapes.items()]
    left = Selection(["a.q_proj"], ["h.fc"], copied)
    assert get_format(compat="quark-0.13").quantization_config(left)["exclude"] == ["h.conv", "h.fc"]
    assert get_format(compat="quark-0.11").quantization_config(left)["exclude"] == ["h.conv", "h.fc", "h.ln_1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"format": "compressed-tensors"}, {"compat": "llm-compressor-0.14"}])
def test_ignore_matches_every_linear_layer_left_alone_and_nothing_that_is_quantized(
    name: str, options: dict[str, Any]
) -> None:
    family = Family.load(name)
    plan = plan_of(family.checkpoint, **options)
    ignore = plan.config["quantization_config"]["ignore"]
    assert [n for n in family.linear_layers_left if not ignored(ignore, n)] == []
    assert [n for n in quantized_modules(family) if ignored(ignore, n)] == []
    assert ignored(ignore, "lm_head")


@pytest.mark.parametrize(
    ("in_file", "in_memory"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("mtp.fc", "model.mtp.fc"),
        ("model.layers.0.router.proj", "language_model.model.layers.0.router.proj"),
        ("model.layers.0.experts.gate_up_proj", "model.layers.0.experts.0.gate_proj"),
        ("lm_head", "language_model.lm_head"),
    ],
)
def test_ignore_finds_whole_components_by_the_names_they_have_in_memory(in_file: str, in_memory: str) -> None:
    fmt = get_format("compressed-tensors")
    ignore = fmt.quantization_config(selection(["model.layers.0.mlp.up_proj"], [in_file]))["ignore"]
    assert ignored(ignore, in_file)
    assert ignored(ignore, in_memory)
    assert not ignored(ignore, "model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("options", [{"format": "compressed-tensors"}, {"compat": "llm-compressor-0.14"}])
def test_a_component_included_in_part_is_ignored_by_name_only(options: dict[str, Any]) -> None:
    names = ["model.layers.0.mlp.up_proj", "vision_tower.layers.0.fc1", "vision_tower.layers.0.fc2", "fusion"]
    checkpoint = headers({f"{n}.weight": ("BF16", (16, 16)) for n in names}, {"model_type": "llama"})
    plan = plan_of(checkpoint, **options, include=["vision_tower.*.fc1", "fusion"])
    ignore = plan.config["quantization_config"]["ignore"]
    assert [n for n in names if ignored(ignore, n)] == ["vision_tower.layers.0.fc2"]
    assert plan.exclude == ("lm_head", "vision_tower.layers.0.fc2")


def test_configs_are_plain_json() -> None:
    for fmt in (*(get_format(name) for name in FORMATS), *(get_format(compat=compat) for compat in COMPATS)):
        config = fmt.quantization_config(selection(["a.q_proj"], ["lm_head"]))
        assert json.loads(json.dumps(config)) == config


def test_a_format_nobody_knows_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'gptq'.*quark, compressed-tensors"):
        get_format("gptq")
    with pytest.raises(UsageError, match=r"'quark-1\.0'.*quark-0\.11, quark-0\.13, llm-compressor-0\.14"):
        get_format(compat="quark-1.0")
