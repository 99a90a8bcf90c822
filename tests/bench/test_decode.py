"""`w8a8 bench decode`, on a Gemma 4 of tiny layers: its twins, what they share, and the reported numbers."""

import json
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from w8a8.bench.decode import FLOAT32_BYTES, bench, fitting_layers, make_float32, make_twin, show
from w8a8.bench.model import GEMMA_4_31B, LAYERS, VOCABULARY, make_model
from w8a8.errors import DoesNotFitError
from w8a8.runtime.linear import W8A8Linear

pytestmark = pytest.mark.slow

TINY = {
    **GEMMA_4_31B,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
}


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any]:
    with torch.inference_mode():
        bf16 = make_model(6, TINY)
        return bf16, make_twin(bf16)


def test_the_layers_are_those_of_gemma_4_31b() -> None:
    with torch.device("meta"):
        model = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA_4_31B, num_hidden_layers=6, vocab_size=64))
    weights = [
        {name: tuple(w.shape) for name, w in layer.named_parameters() if w.dim() == 2} for layer in model.model.layers
    ]
    mlp = {"mlp.gate_proj": (21504, 5376), "mlp.up_proj": (21504, 5376), "mlp.down_proj": (5376, 21504)}
    sliding = {"q_proj": (8192, 5376), "k_proj": (4096, 5376), "v_proj": (4096, 5376), "o_proj": (5376, 8192)}
    full = {"q_proj": (16384, 5376), "k_proj": (2048, 5376), "o_proj": (5376, 16384)}
    for layer, attention in zip(weights, [sliding] * 5 + [full], strict=True):
        named = mlp | {f"self_attn.{name}": shape for name, shape in attention.items()}
        assert layer == {f"{name}.weight": shape for name, shape in named.items()}


def test_the_twin_differs_in_its_linear_layers_only(twins: tuple[Any, Any]) -> None:
    bf16, w8a8 = twins
    linears = {n for n, m in bf16.named_modules() if type(m) is nn.Linear}
    assert {n for n, m in w8a8.named_modules() if isinstance(m, W8A8Linear)} == linears - {"lm_head"}
    assert w8a8.lm_head.weight is bf16.lm_head.weight
    assert bf16.config.vocab_size == VOCABULARY * 6 // LAYERS
    assert all(p.detach().isfinite().all() for p in bf16.parameters())


def test_nothing_is_left_uninitialized(twins: tuple[Any, Any]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = Gemma4ForCausalLM(twins[0].config)
    finally:
        torch.set_default_dtype(before)
    for twin in twins:
        found = dict(twin.named_buffers()) | {n: p for n, p in twin.named_parameters() if n.endswith("norm.weight")}
        assert len(found) > 20
        for name, value in found.items():
            expected = made.get_parameter(name) if name.endswith("norm.weight") else made.get_buffer(name)
            assert value.dtype == expected.dtype, name
            assert torch.equal(value, expected), name


def test_the_twins_all_but_agree(twins: tuple[Any, Any]) -> None:
    with torch.inference_mode():
        exact, near = (twin(torch.arange(40)[None]).logits.float() for twin in twins)
    assert 0 < (near - exact).norm() / exact.norm() < 0.1


def test_the_float32_model_has_a_weight_for_each_shape(twins: tuple[Any, Any]) -> None:
    bf16 = twins[0]
    with torch.inference_mode():
        made = make_float32(bf16)
        assert made(torch.arange(40)[None]).logits.dtype == torch.float32
    assert {p.dtype for p in (*made.parameters(), *made.buffers()) if p.is_floating_point()} == {torch.float32}
    assert [p.shape for p in made.parameters()] == [*dict.fromkeys(p.shape for p in bf16.parameters())]
    assert bf16.lm_head.weight.dtype == torch.bfloat16


def test_float32_weights_are_counted_by_the_shapes_of_the_layers() -> None:
    with torch.device("meta"):
        layers = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA_4_31B, num_hidden_layers=6, vocab_size=64)).model.layers
    assert sum(4 * shape.numel() for shape in {w.shape for w in layers.parameters() if w.dim() == 2}) == FLOAT32_BYTES


def test_it_times_every_token_and_every_prefill_of_both() -> None:
    result = bench(layers=2, tokens=3, prompt=8, runs=2, shapes=TINY)
    for decode, prefill in (
        (result.w8a8_decode, result.w8a8_prefill),
        (result.bf16_decode, result.bf16_prefill),
        (result.float32_decode, result.float32_prefill),
    ):
        assert (len(decode), len(prefill)) == (3, 2)
        assert min(*decode, *prefill) > 0
    values = json.loads(json.dumps(result.to_dict()))
    assert (values["layers"], values["prompt"]) == (2, 8)
    for rate in (values["decode_tokens_per_second"], values["prefill_tokens_per_second"]):
        assert rate["speedup"] == rate["w8a8"] / max(rate["bf16"], rate["float32"])
    text = StringIO()
    show(result, Console(file=text, width=120).print)
    assert "medians of 3 tokens and 2 prefills" in text.getvalue()
    assert "prefill of 8" in text.getvalue()


def test_layers_are_chosen_to_fit_memory() -> None:
    assert fitting_layers(10**12) == LAYERS
    assert fitting_layers(24 * 2**30) == 6
    assert fitting_layers(8 * 10**9) == 2
    with pytest.raises(DoesNotFitError, match="one layer"):
        fitting_layers(10**9)
