"""A layer with experts has all of them."""

from typing import Any

import pytest

from tests.checkpoints import LLAMA
from tests.named import headers
from w8a8.errors import DuplicateTensorError, SourceError
from w8a8.plan.viewing import view_of

CONFIG = {**LLAMA, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
MLP = "model.layers.0.mlp.experts"


def experts(count: int) -> Tensors:
    tensors: Tensors = {}
    for i in range(count):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"{MLP}.{i}.{leaf}.weight"] = "F8_E4M3", (16, 16)
            tensors[f"{MLP}.{i}.{leaf}.weight_scale_inv"] = "F32", (1, 1)
    return tensors


def without(tensors: Tensors, start: str) -> Tensors:
    return {name: value for name, value in tensors.items() if not name.startswith(start)}


def test_all_experts_are_seen() -> None:
    assert len(view_of(headers(experts(4), CONFIG)).tensors) == 12


@pytest.mark.parametrize("unused", [(), ("gate_proj", "up_proj")])
def test_experts_that_give_back_what_they_read_need_no_weights(unused: tuple[str, ...]) -> None:
    config = {**CONFIG, "zero_expert_num": 2}
    tensors = experts(4) | {f"{MLP}.{i}.{leaf}.weight": ("BF16", (16, 16)) for i in (4, 5) for leaf in unused}
    assert len(view_of(headers(tensors, config)).tensors) == 12 + 2 * len(unused)
    with pytest.raises(SourceError, match=r"experts\.3\.down_proj\.weight is missing, which other experts have"):
        view_of(headers(without(tensors, f"{MLP}.3."), config))


@pytest.mark.parametrize(
    ("tensors", "config", "missing"),
    [
        (without(experts(4), f"{MLP}.2."), CONFIG, f"{MLP}.2.down_proj.weight"),
        (without(experts(4), f"{MLP}.1.up_proj"), CONFIG, f"{MLP}.1.up_proj.weight"),
        (experts(3), CONFIG, f"{MLP}.3.down_proj.weight"),
        (without(experts(4), f"{MLP}.2."), {**CONFIG, "num_experts": None}, f"{MLP}.2.down_proj.weight"),
    ],
)
def test_one_that_is_missing_is_named(tensors: Tensors, config: dict[str, Any], missing: str) -> None:
    with pytest.raises(SourceError, match=rf"{missing} is missing, which other experts have"):
        view_of(headers(tensors, config))


def test_a_weight_that_is_there_twice_is_refused() -> None:
    base = "model.layers.0.self_attn.q_proj"
    packed: Tensors = {
        f"{base}.weight": ("BF16", (16, 16)),
        f"{base}.weight_packed": ("I32", (16, 2)),
        f"{base}.weight_scale": ("BF16", (16, 1)),
    }
    with pytest.raises(DuplicateTensorError, match=r"q_proj\.weight is there as it is, and quantized"):
        view_of(headers(packed, LLAMA))
