"""Folding changes no logits: in float32, for every architecture that has groups."""

import copy
from typing import Any

import pytest
import torch

from tests.recipes import small
from w8a8.recipes.folding import divide, expand, heads_of, storable
from w8a8.recipes.groups import Group, groups_of

pytestmark = pytest.mark.slow

IDS = torch.arange(40)[None] % 96


def random_scales(layer: Any, group: Group, dtype: torch.dtype) -> torch.Tensor:
    """From about 0.1 to 10, as far as folding can come to them."""
    channels = layer.get_submodule(group.producer).weight.shape[0]
    return storable(layer, group, torch.randn(channels, generator=torch.Generator().manual_seed(1)).exp(), dtype)


def scalable(made: Any, layer: Any) -> list[Group]:
    return [g for g in groups_of(small.config_of(made), layer) if g.producer is not None]


@pytest.mark.parametrize("kind", small.KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_folding_random_scales_leaves_the_logits(kind: str, dtype: torch.dtype) -> None:
    made = small.model(kind)
    for parameter in made.parameters():
        if parameter.ndim == 1:  # as norms and biases lie in a checkpoint
            parameter.copy_(parameter.to(dtype).float())
    folded = copy.deepcopy(made)
    for layer in folded.base_model.layers:
        for group in scalable(made, layer):
            producer = layer.get_submodule(group.producer)
            if getattr(producer, "bias", None) is not None and dtype != torch.float32:
                continue  # a rounded bias is not quite the same
            scales = random_scales(layer, group, dtype)
            divide(layer, group, scales, dtype)
            for path in group.consumers:
                layer.get_submodule(path).weight.mul_(expand(scales, heads_of(layer, group)))
    before, after = made(IDS).logits, folded(IDS).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("kind", small.KNOWN)
def test_dividing_alone_changes_the_logits(kind: str) -> None:
    """In every group: else the test above could not fail."""
    made = small.model(kind)
    before = made(IDS).logits
    groups = scalable(made, made.base_model.layers[0])
    assert len(groups) == {"gemma4": 3, "olmo2": 2, "glm4": 3}.get(kind, 4)
    for group in groups:
        changed = copy.deepcopy(made)
        layer = changed.base_model.layers[0]
        divide(layer, group, random_scales(layer, group, torch.float32), torch.float32)
        assert (changed(IDS).logits - before).abs().max() > 1e-2 * before.abs().max(), group


def test_a_channel_that_rounding_would_switch_off_is_left_alone() -> None:
    made = small.model("gemma3")
    layer = made.base_model.layers[0]
    group = groups_of(small.config_of(made), layer)[0]
    layer.input_layernorm.weight[:3] = torch.tensor([-1.0, -0.996, 0.5])
    scales = storable(layer, group, torch.full((48,), 100.0), torch.bfloat16)
    assert scales[:2].tolist() == [1, 1]
    assert scales[2] > 90


def test_values_that_are_normalised_or_keys_too_are_not_scaled() -> None:
    made = small.model("gemma4")
    groups = [groups_of(small.config_of(made), layer)[1] for layer in made.base_model.layers]
    assert [(group.consumers, group.producer) for group in groups] == [(("self_attn.o_proj",), None)] * 3


def test_where_no_norm_makes_the_activations_they_are_not_scaled() -> None:
    made = small.model(small.POST_NORMED)
    layer = made.base_model.layers[0]
    assert [(g.name, g.producer) for g in groups_of(small.config_of(made), layer)] == [
        ("q/k/v", None),
        ("o", "self_attn.v_proj"),
        ("gate/up", None),
        ("down", "mlp.up_proj"),
    ]


def test_consumers_that_a_layer_does_not_have_are_left_out() -> None:
    made = small.model("gemma4")
    groups = [groups_of(small.config_of(made), layer)[0] for layer in made.base_model.layers]
    assert [len(group.consumers) for group in groups] == [3, 3, 2]


def test_an_unknown_architecture_has_no_groups() -> None:
    assert groups_of({"model_type": "phi"}, small.model("llama").base_model.layers[0]) == ()
