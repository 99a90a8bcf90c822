"""A layer, calibrated: better than rounded to nearest where there are outliers, and never worse."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.recipes import small
from w8a8.recipes.groups import groups_of
from w8a8.recipes.layer import LayerResult, Recipe, RecipeName, calibrate_layer, quantized


def calibrated(made: Any, number: int, name: RecipeName, batches: list[small.Batch]) -> LayerResult:
    layer = made.base_model.layers[number]
    return calibrate_layer(layer, groups_of(small.config_of(made), layer), batches, Recipe(name), torch.bfloat16)


def error(layer: nn.Module, made: nn.Module, batches: list[small.Batch]) -> float:
    def states(module: nn.Module, batch: small.Batch) -> Tensor:
        out = module(batch.hidden.clone(), **batch.kwargs)
        return out[0] if isinstance(out, tuple) else out

    pairs = [(states(layer, batch), states(made, batch)) for batch in batches]
    return sum(float((a - b).square().sum() / a.square().sum()) for a, b in pairs)


@pytest.mark.parametrize("kind", small.KNOWN)
@pytest.mark.parametrize("number", [0, 2])
def test_recipes_lower_the_error_of_a_layer_with_outliers(kind: str, number: int) -> None:
    made = small.model(kind)
    layer, batches = made.base_model.layers[number], small.batches(made, number)
    held = [batch for batch in batches if batch.held_out]
    errors = {name: error(layer, quantized(layer, calibrated(made, number, name, batches)), held)
              for name in ("rtn", "smooth", "smooth+gptq")}
    print(kind, errors)
    assert errors["smooth"] < 0.7 * errors["rtn"]
    assert errors["smooth+gptq"] < 0.6 * errors["rtn"]
