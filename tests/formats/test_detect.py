import json
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from tests.named import selection
from w8a8.errors import NoConfigError
from w8a8.formats import FORMATS, detect, get_format

METHODS = {
    "quark-0.11.2": "quark",
    "quark-0.13": "quark",
    "llmcompressor-0.14.0.1": "compressed-tensors",
}


def made(name: str) -> dict[str, Any]:
    config = get_format(name).quantization_config(selection(["a.q_proj"], ["lm_head", "b.vision_tower.c"]))
    return {"model_type": "llama", "quantization_config": deepcopy(dict(config))}


@pytest.mark.parametrize("name", FORMATS)
def test_our_own_outputs_are_recognized(name: str) -> None:
    scheme = detect(made(name))
    assert (scheme.method, scheme.w8a8) == (name, True)
    assert "per channel" in scheme.summary
    assert scheme.leaves_alone("lm_head")
    assert scheme.leaves_alone("b.vision_tower.c")
    assert not scheme.leaves_alone("a.q_proj")


@pytest.mark.parametrize("tool", METHODS)
def test_the_other_tools_outputs_are_recognized(tool: str, golden: Path) -> None:
    scheme = detect(json.loads((golden / tool / "config.json").read_text()))
    assert (scheme.method, scheme.w8a8) == (METHODS[tool], True)
    assert scheme.leaves_alone("lm_head")


def test_an_unquantized_config_says_so() -> None:
    configs: list[dict[str, Any]] = [{}, {"quantization_config": None}, {"quantization_config": {}}, {"text_config": 7}]
    for config in configs:
        assert detect(config).method == "none"
        assert not detect(config).w8a8


@pytest.mark.parametrize("place", ["quantization_config", "compression_config"])
def test_a_scheme_is_found_where_engines_look_for_it(place: str) -> None:
    declared = made("quark")["quantization_config"]
    assert detect({place: declared}).w8a8
    assert detect({"text_config": {place: declared}}).w8a8


@pytest.mark.parametrize(
    "declared",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False},
        {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
    ],
)
def test_other_schemes_are_named_but_not_taken_for_w8a8(declared: dict[str, Any]) -> None:
    scheme = detect({"quantization_config": declared})
    assert scheme.method == declared["quant_method"]
    assert scheme.method in scheme.summary
    assert not scheme.w8a8
    assert not scheme.leaves_alone("lm_head")


@pytest.mark.parametrize(
    ("part", "change", "summary"),
    [
        ("weight", {"dtype": "fp8_e4m3"}, "fp8_e4m3 per_channel weights"),
        ("weight", {"qscheme": "per_tensor"}, "int8 per_tensor weights"),
        ("weight", {"symmetric": False}, "int8"),
        ("weight", {"is_dynamic": True}, "int8"),
        ("weight", {"ch_axis": 1}, "int8"),
        ("input_tensors", {"is_dynamic": False}, "int8"),
        ("input_tensors", {"dtype": "int4"}, "int4 inputs"),
    ],
)
def test_a_quark_config_that_differs_in_one_point_is_described(part: str, change: dict[str, Any], summary: str) -> None:
    config = made("quark")
    config["quantization_config"]["global_quant_config"][part].update(change)
    scheme = detect(config)
    assert not scheme.w8a8
    assert summary in scheme.summary


@pytest.mark.parametrize(
    ("part", "change", "summary"),
    [
        ("weights", {"num_bits": 4}, "4-bit int weights"),
        ("weights", {"type": "float"}, "8-bit float weights"),
        ("weights", {"strategy": "group"}, "8-bit int"),
        ("weights", {"symmetric": False}, "8-bit int"),
        ("weights", {"dynamic": True}, "8-bit int"),
        ("input_activations", {"dynamic": False}, "8-bit int"),
        ("input_activations", {"strategy": "tensor"}, "8-bit int"),
    ],
)
def test_a_compressed_tensors_config_that_differs_in_one_point_is_described(
    part: str, change: dict[str, Any], summary: str
) -> None:
    config = made("compressed-tensors")
    config["quantization_config"]["config_groups"]["W8A8"][part].update(change)
    scheme = detect(config)
    assert not scheme.w8a8
    assert summary in scheme.summary


def test_weights_quantized_without_their_inputs_are_not_w8a8() -> None:
    quark, compressed = made("quark"), made("compressed-tensors")
    quark["quantization_config"]["global_quant_config"]["input_tensors"] = None
    compressed["quantization_config"]["config_groups"]["W8A8"]["input_activations"] = None
    assert not detect(quark).w8a8
    assert "unquantized inputs" in detect(quark).summary
    assert not detect(compressed).w8a8


def test_a_scheme_that_differs_by_layer_is_not_w8a8() -> None:
    quark, compressed = made("quark"), made("compressed-tensors")
    quark["quantization_config"]["layer_quant_config"] = {"*.mlp.*": {"weight": None}}
    groups = compressed["quantization_config"]["config_groups"]
    groups["second"] = deepcopy(groups["W8A8"])
    for config in (quark, compressed):
        assert not detect(config).w8a8
        assert "not one scheme" in detect(config).summary


@pytest.mark.parametrize(
    "garbage",
    [
        "int8",
        ["quark"],
        7,
        {"quant_method": None},
        {"quant_method": "quark"},
        {"quant_method": "quark", "global_quant_config": [], "exclude": "lm_head"},
        {"quant_method": "quark", "global_quant_config": {"weight": [{"dtype": "int8"}]}, "exclude": [1, None]},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "config_groups": {"a": None}, "ignore": {"lm_head": 1}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 8}}, "ignore": [["lm_head"]]},
    ],
)
def test_garbage_is_neither_w8a8_nor_a_crash(garbage: Any) -> None:
    scheme = detect({"quantization_config": garbage})
    assert not scheme.w8a8
    assert scheme.method != "none"
    assert not scheme.leaves_alone("lm_head")


def test_patterns_match_from_the_start_names_exactly_and_broken_patterns_nothing() -> None:
    config = made("quark")
    config["quantization_config"]["exclude"] = ["a.b", "re:.*tower", "re:x", "re:(", "*glob*"]
    scheme = detect(config)
    assert scheme.leaves_alone("a.b")
    assert scheme.leaves_alone("c.tower.d")
    assert scheme.leaves_alone("x.y")
    for module in ("a.b.c", "b", "y.x", "(", "a.glob.b"):
        assert not scheme.leaves_alone(module)


NAME = "model.layers.0.self_attn.q_proj.weight_of_some_length!x"


@pytest.mark.parametrize("pattern", ["re:(([a-z_0-9.]+)+[!?])+$", "re:(?R)"])
def test_a_pattern_that_does_not_come_to_an_end_is_an_error(pattern: str) -> None:
    config = made("compressed-tensors")
    config["quantization_config"]["ignore"] = ["lm_head", pattern]
    scheme = detect(config)
    assert scheme.leaves_alone("lm_head")
    started = time.perf_counter()
    with pytest.raises(NoConfigError, match=r"re:.* does not come to an end"):
        [scheme.leaves_alone(f"{NAME}{i}") for i in range(100_000)]
    assert time.perf_counter() - started < 30


@pytest.mark.parametrize(
    "pattern",
    [
        *("(", "a{4294967296}", "(?:(?:a?){1000}){1000}b", "((a{1,99}){1,99}){1,99}", "x" * 100_000, "(?P<a>x)(?P<"),
        *("(" * 5000 + ")" * 5000, "[" + "a-z" * 100_000 + "]", "(?<=a+"),
    ],
)
def test_a_pattern_beyond_all_measure_matches_nothing_and_is_named(pattern: str) -> None:
    config = made("quark")
    config["quantization_config"]["exclude"] = [f"re:{pattern}", "re:a.*"]
    scheme = detect(config)
    assert scheme.leaves_alone("abc")
    assert not scheme.leaves_alone("x" * 100_000)
    assert scheme.unusable == (f"re:{pattern}",)


def test_a_pattern_on_which_pythons_own_engine_never_ends_is_decided() -> None:
    config = made("quark")
    config["quantization_config"]["exclude"] = ["re:([a-z_0-9.]+)+!"]
    assert not detect(config).leaves_alone("model.layers.0.self_attn.q_proj.weight_of_some_length")


def test_what_people_write_in_patterns_is_understood() -> None:
    config = made("quark")
    config["quantization_config"]["exclude"] = [r"re:^(?!.*q_proj).*self_attn", r"re:model\.layers\.\d{1,2}\.mlp$"]
    scheme = detect(config)
    assert scheme.leaves_alone("model.layers.3.self_attn.k_proj")
    assert not scheme.leaves_alone("model.layers.3.self_attn.q_proj")
    assert scheme.leaves_alone("model.layers.31.mlp")
    assert scheme.unusable == ()
