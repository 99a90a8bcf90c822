"""A layer, calibrated: better than rounded to nearest where there are outliers, and never worse."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recipes import small
from w8a8.recipes import RecipeName
from w8a8.recipes.gptq import Codes
from w8a8.recipes.groups import groups_of
from w8a8.recipes.layer import LayerResult, calibrate_layer, quantized
from w8a8.runtime.linear import W8A8Linear
from w8a8.runtime.streamed import states_of

pytestmark = pytest.mark.slow


def calibrated(made: Any, number: int, name: RecipeName, batches: list[small.CostedBatch]) -> LayerResult:
    layer = made.base_model.layers[number]
    rows = small.row_costs(batches)
    return calibrate_layer(layer, groups_of(small.config_of(made), layer), batches, rows, name, torch.bfloat16)


def error(layer: nn.Module, made: nn.Module, batches: list[small.CostedBatch]) -> float:
    def states(module: nn.Module, batch: small.CostedBatch) -> Tensor:
        return states_of(module(batch.hidden.clone(), **batch.kwargs))

    pairs = [(states(layer, batch), states(made, batch)) for batch in batches]
    return sum(float((a - b).square().sum() / a.square().sum()) for a, b in pairs)


@pytest.mark.parametrize(
    ("kind", "number"), [*((kind, 0) for kind in small.KNOWN if kind != small.POST_NORMED), ("gemma4", 2)]
)
def test_recipes_lower_the_error_of_a_layer_with_outliers(kind: str, number: int) -> None:
    made = small.model(kind)
    layer, batches = made.base_model.layers[number], small.batches(made, number)
    held = [batch for batch in batches if batch.held_out]
    errors = {
        name: error(layer, quantized(layer, calibrated(made, number, name, batches)), held)
        for name in ("rtn", "smooth", "smooth+gptq")
    }
    assert errors["smooth"] < 0.5 * errors["rtn"]
    assert errors["smooth+gptq"] < errors["smooth"]


def test_where_no_norm_can_be_folded_into_weights_are_rounded_better_all_the_same() -> None:
    made = small.model(small.POST_NORMED)
    layer, batches = made.base_model.layers[0], small.batches(made, 0)
    held = [batch for batch in batches if batch.held_out]
    results = {name: calibrated(made, 0, name, batches) for name in ("rtn", "smooth", "smooth+gptq")}
    errors = {name: error(layer, quantized(layer, result), held) for name, result in results.items()}
    assert errors["smooth+gptq"] < errors["smooth"] < errors["rtn"]
    better = {name: {gain.group for gain in result.gains if gain.error < gain.rtn} for name, result in results.items()}
    assert better == {"rtn": set(), "smooth": {"o", "down"}, "smooth+gptq": {"o", "gate/up", "down"}}
    assert not any(isinstance(value, Tensor) for value in results["smooth+gptq"].tensors.values())


def test_a_group_that_the_recipe_makes_worse_on_held_out_batches_is_rounded_to_nearest() -> None:
    """Calibration sees outliers in some channels; the held-out batches have them in others, far larger."""
    made = small.model("llama")
    batches = small.batches(made, 0, outliers=100.0)
    swapped = [
        dataclasses.replace(batch, hidden=batch.hidden.roll(5, -1)) if batch.held_out else batch for batch in batches
    ]
    result = calibrated(made, 0, "smooth", swapped)
    fallen = [gain for gain in result.gains if gain.chosen == "rtn"]
    assert fallen
    assert all(gain.error == gain.rtn for gain in fallen)
    assert all(gain.error <= gain.rtn for gain in result.gains)
    assert calibrated(made, 0, "smooth", batches).gains[0].chosen == "smooth"


def test_auto_takes_the_best_of_all() -> None:
    made = small.model("qwen3")
    batches = small.batches(made, 1)
    by_name: dict[RecipeName, LayerResult] = {
        name: calibrated(made, 1, name, batches) for name in ("smooth", "smooth+gptq", "auto")
    }
    first = [result.gains[0] for result in by_name.values()]
    assert first[2].error == min(gain.error for gain in first)
    assert all(gain.chosen in ("rtn", "smooth", "smooth+gptq") for gain in by_name["auto"].gains)


def test_the_layer_is_left_as_it_was_and_the_result_names_what_changed() -> None:
    made = small.model("gemma3")
    layer = made.base_model.layers[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    result = calibrated(made, 0, "smooth+gptq", small.batches(made, 0))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert isinstance(layer.self_attn.q_proj, nn.Linear)
    assert set(result.tensors) <= set(before)
    norm = result.tensors["input_layernorm.weight"]
    assert isinstance(norm, Tensor)
    assert norm.dtype == torch.bfloat16
    for name, value in result.tensors.items():
        if isinstance(value, Codes):
            assert value.codes.dtype == torch.int8
            assert value.codes.shape == before[name].shape
            assert value.scale.dtype == torch.float32
            assert value.scale.shape == before[name].shape[:1]
    assert sum(isinstance(module, W8A8Linear) for module in quantized(layer, result).modules()) == 7


def test_without_groups_everything_is_rounded_to_nearest() -> None:
    made = small.model("llama")
    layer = made.base_model.layers[0]
    result = calibrate_layer(layer, (), small.batches(made, 0), {}, "auto", torch.bfloat16)
    assert result == LayerResult({}, ())
    assert sum(isinstance(module, W8A8Linear) for module in quantized(layer, result).modules()) == 7
