"""Groups found by running a layer are those of the tables, where there are tables."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.recipes import small
from tests.runtime.moe import make as make_mixture
from w8a8.calibrate.grouping import traced
from w8a8.checkpoint import Checkpoint
from w8a8.plan import Rules
from w8a8.plan.viewing import view_of
from w8a8.recipes.groups import Group, groups_of
from w8a8.recipes.trace import random_copy, trace
from w8a8.runtime.calls import Call, States
from w8a8.runtime.streamed import StreamedModel

pytestmark = pytest.mark.slow

TOKENS = 16
BETTER = {("glm4", "down"): Group("down", ("mlp.down_proj",), "mlp.gate_up_proj", "linear", start=80)}
"""What is found that no table can say: which rows of a fused layer make a group's values."""


def traced_layer(kind: str, number: int) -> tuple[Group, ...]:
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
    assert [replace(group, name="") for group in traced_layer(kind, number)] == [
        replace(group, name="") for group in wanted
    ]


def test_a_copy_is_random_and_leaves_the_layer_as_it_was() -> None:
    layer = small.model("gemma3").base_model.layers[0]
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    one, other = (random_copy(layer, torch.device("cpu")).state_dict() for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    for name, value in one.items():
        assert torch.equal(value, other[name])
        assert not torch.equal(value, before[name])
        assert value.unique().numel() > 1


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gemma4", "granitemoe"])
def test_so_it_is_for_mixtures_of_experts(family: str, tmp_path: Path) -> None:
    view = view_of(Checkpoint.open(make_mixture(tmp_path, family)))
    model = StreamedModel(family, view, torch.float32, room=2**40)
    found = traced(model, Rules.for_config(view.config), range(3, 3 + TOKENS))
    for number in range(model.count):
        assert as_sets(found[number]) == as_sets(groups_of(view.config, model.hollow(number)))


def test_what_no_table_says_of_experts_is_found(tmp_path: Path) -> None:
    view = view_of(Checkpoint.open(make_mixture(tmp_path, "glm4_moe")))
    model = StreamedModel("glm4_moe", view, torch.float32, room=0)  # no expert is in memory
    assert not groups_of(view.config, model.hollow(1))
    *_, gate, first, _, _, _, shared = traced(model, Rules.for_config(view.config), range(3, 3 + TOKENS))[1]
    assert (gate.name, gate.producer, gate.readers) == ("gate/up", "post_attention_layernorm", ("mlp.gate",))
    assert {f"mlp.experts.{part}.{n}" for part in ("gate_proj", "up_proj") for n in range(4)} < {*gate.consumers}
    assert shared.producer == "mlp.shared_experts.up_proj"
    assert (first.consumers, first.producer) == (("mlp.experts.down_proj.0",), "mlp.experts.up_proj.0")


def as_sets(groups: Sequence[Group]) -> set[tuple[frozenset[str], str | None, float, frozenset[str]]]:
    return {(frozenset(g.consumers), g.producer, g.offset, frozenset(g.readers)) for g in groups}
