"""Groups found by running a layer are those of the tables, where there are tables."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.recipes import small
from w8a8.recipes.groups import Group, groups_of
from w8a8.recipes.trace import random_copy, trace
from w8a8.runtime.calls import Call, States

pytestmark = pytest.mark.slow

TOKENS = 16
BETTER = {("glm4", "down"): Group("down", ("mlp.down_proj",), "mlp.gate_up_proj", "linear", start=80)}
"""What is found that no table can say: which rows of a fused layer make a group's values."""


def traced(kind: str, number: int) -> tuple[Group, ...]:
    made = small.model(kind)
    kwargs = small.kwargs_of(made, number, torch.arange(TOKENS)[None])
    states = torch.randn(kwargs.pop("hidden_states").shape, generator=torch.Generator().manual_seed(0))
    layer = made.base_model.layers[number]
    linear = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    found: tuple[Group, ...] = trace(random_copy(layer, torch.device("cpu")), Call(States(states), kwargs), linear)
    return found


@pytest.mark.parametrize(("kind", "number"), [*((kind, 0) for kind in small.KNOWN), ("gemma4", 2)])
def test_what_is_found_is_what_the_table_says(kind: str, number: int) -> None:
    made = small.model(kind)
    table = groups_of(small.config_of(made), made.base_model.layers[number])
    wanted = [BETTER.get((kind, group.name), group) for group in table]
    assert [replace(group, name="") for group in traced(kind, number)] == [replace(group, name="") for group in wanted]


def test_a_copy_is_random_and_leaves_the_layer_as_it_was() -> None:
    layer = small.model("gemma3").base_model.layers[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    one, other = (random_copy(layer, torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for name, value in one.items():
        assert torch.equal(value, other[name])
        assert not torch.equal(value, before[name])
        assert value.unique().numel() > 1
