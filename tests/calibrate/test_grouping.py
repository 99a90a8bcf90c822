"""Architectures without a table have the groups that running their layers finds, and folding by these is exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.support.tiny import make_model
from w8a8.calibrate.grouping import groups_of_layers
from w8a8.checkpoint import Checkpoint
from w8a8.recipes.folding import channels_of, divide, expand, heads_of, multiply
from w8a8.recipes.groups import Group
from w8a8.runtime.streamed import StreamedModel
from w8a8.sources.opening import as_run

pytestmark = pytest.mark.slow

IDS = list(range(3, 35))
FOUND = {
    "phi3": {
        "qkv": ("input_layernorm", "norm", ()),
        "o": ("self_attn.qkv_proj", "value", ()),
        "gate_up": ("post_attention_layernorm", "norm", ()),
        "down": ("mlp.gate_up_proj", "linear", ()),
    },
    "granite": {
        "q/k/v": ("input_layernorm", "norm", ()),
        "o": ("self_attn.v_proj", "value", ()),
        "gate/up": ("post_attention_layernorm", "norm", ()),
        "down": ("mlp.up_proj", "linear", ()),
    },
    "qwen3_5_text": {
        "in_proj_qkv/in_proj_z": ("input_layernorm", "norm", ("linear_attn.in_proj_b", "linear_attn.in_proj_a")),
        "out": (None, None, ()),
        "q/k/v": ("input_layernorm", "norm", ()),
        "o": ("self_attn.v_proj", "value", ()),
        "gate/up": ("post_attention_layernorm", "norm", ()),
        "down": ("mlp.up_proj", "linear", ()),
    },
    "opt": {
        "q/k/v": ("self_attn_layer_norm", "norm", ()),
        "out": ("self_attn.v_proj", "linear", ()),
        "fc1": ("final_layer_norm", "norm", ()),
        "fc2": ("fc1", "linear", ()),
    },
    "arcee": {
        "q/k/v": ("input_layernorm", "norm", ()),
        "o": ("self_attn.v_proj", "value", ()),
        "up": ("post_attention_layernorm", "norm", ()),
        "down": (None, None, ()),
    },
}
"""Of all layers, by the groups' names: the producer, its kind, and the readers that stay as they are. Values are linear
in v, and what a ReLU makes in fc1; the square of a ReLU (Arcee) is not, nor what a gated delta net does (Qwen 3.5)."""


def groups_of(folder: Path) -> list[tuple[Group, ...]]:
    """The groups of each layer of a checkpoint."""
    model = StreamedModel("model", as_run(Checkpoint.open(folder)), torch.float32)
    return groups_of_layers(model, json.loads((folder / "config.json").read_text()), IDS, lambda _: None)


@pytest.mark.parametrize("model_type", FOUND)
def test_groups_are_found_and_folding_by_them_changes_no_logits(model_type: str, tmp_path: Path) -> None:
    make_model(model_type, torch.float32).save_pretrained(tmp_path)
    groups = groups_of(tmp_path)
    found = {g.name: (g.producer, g.kind, g.readers) for layer in groups for g in layer}
    assert found == FOUND[model_type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval().double()
    before = logits(model)
    decoder: Any = model.get_decoder()
    for layer, own in zip(decoder.layers, groups, strict=True):
        for group in own:
            fold(layer, group)
    after = logits(model)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()  # norms and delta nets compute in float32


@torch.no_grad()  # type: ignore[untyped-decorator]
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits
    return found


def fold(layer: Any, group: Group) -> None:
    """Fold random scales, from about 0.1 to 10."""
    if group.producer is not None:
        generator = torch.Generator().manual_seed(1)
        scales = torch.randn(channels_of(layer, group), generator=generator, dtype=torch.float64).exp()
        divide(layer, group, scales, torch.float64)
        paths = [*group.consumers, *group.readers]
        multiply(layer, paths, expand(scales, heads_of(layer, group)), torch.float64)
