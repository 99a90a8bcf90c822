"""Caches of sequences that run together: in place, of the size that is counted, right for every kind of attention."""

from typing import Any

import pytest
import torch
import transformers

from tests.serve.embedded.test_batching import SMALL, alone, gemma3, gemma4, llama, prompts, qwen35, settings, together
from tests.serve.embedded.test_batching import tokenizer as tokenizer
from w8a8.serve.embedded.caches import SLACK, Caches, Memory

pytestmark = pytest.mark.slow


def gemma2() -> Any:
    """Capped logits, which torch's attention lacks."""
    config = transformers.Gemma2Config(**SMALL, sliding_window=16, attn_logit_softcapping=0.5)
    return transformers.Gemma2ForCausalLM(config)


def deepseek() -> Any:
    """A cache of latents, of which every step makes keys and values."""
    latent = {
        "num_key_value_heads": 4,
        "head_dim": 8,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    }
    config = transformers.DeepseekV3Config(**{**SMALL, **latent}, first_k_dense_replace=3)
    return transformers.DeepseekV3ForCausalLM(config)


def llama4() -> Any:
    """Attention within chunks of 16 tokens."""
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 96, "moe_layers": []}
    config = transformers.Llama4TextConfig(**SMALL, **experts, attention_chunk_size=16)
    return transformers.Llama4ForCausalLM(config)


def diffllama() -> Any:
    """Attention that is given other values than its cache's."""
    return transformers.DiffLlamaForCausalLM(transformers.DiffLlamaConfig(**SMALL))


def doge() -> Any:
    """Attention with a mask that each layer makes of its values."""
    return transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL, keep_window_size=4))


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize(
    ("kind", "join", "apart"),
    [
        (llama, True, True),
        (gemma3, True, True),
        (gemma4, True, True),
        (gemma2, True, False),
        (deepseek, True, False),
        (llama4, True, False),
        (diffllama, True, False),
        (doge, False, False),
        (qwen35, False, False),
    ],
)
def test_which_models_attend_to_each_sequence_by_itself(kind: Any, join: bool, apart: bool) -> None:
    caches = Caches(made(kind))
    assert (caches.join, caches.apart) == (join, apart)
    assert caches.dtype == (torch.float32 if join else None)


@pytest.mark.parametrize("kind", [gemma2, deepseek, llama4, diffllama, doge])
def test_others_get_the_tokens_they_get_alone_too(kind: Any, tokenizer: Any) -> None:
    model = made(kind)
    asked = list(zip(prompts(3, 40, 1, 25), (40, 20, 30, 10), strict=True))
    got = together(model, tokenizer, [(p, settings(n)) for p, n in asked], apart=0.02)
    assert got == [alone(model, p, n, eos_token_id=7) for p, n in asked]


@pytest.mark.parametrize("kind", [llama, gemma3, gemma4, deepseek])
def test_a_cache_stays_where_it_is_and_takes_what_was_counted(kind: Any) -> None:
    model = made(kind)
    caches = Caches(model)
    cache = caches.of_one(120)
    places = set()
    with torch.inference_mode():
        for begin, end in [(0, 50), (50, 90), *((n, n + 1) for n in range(90, 120))]:
            ids = torch.arange(begin, end)[None] + 8
            model(input_ids=ids, position_ids=torch.arange(begin, end)[None], past_key_values=cache)
            places.add(tuple(layer.keys.data_ptr() for layer in cache.layers if isinstance(layer, Memory)))
    held = [layer for layer in cache.layers if isinstance(layer, Memory)]
    assert len(places) == 1
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in held) == caches.nbytes(120)
    assert {layer.keys.shape[-2] for layer in held} <= {120, 15 + SLACK}


def test_a_window_is_counted_once_it_is_full() -> None:
    caches = Caches(made(gemma3))
    token = 2 * 2 * 16 * 4  # keys and values of two heads
    assert caches.nbytes(10) == 3 * 10 * token
    assert caches.nbytes(200) == (200 + 2 * (15 + SLACK)) * token
    assert caches.longest(256, caches.nbytes(200)) == 200
    assert caches.longest(256, caches.nbytes(200) - 1) == 199
    assert caches.longest(256, 2**40) == 256
    assert caches.longest(256, -1) == 0
