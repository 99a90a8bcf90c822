"""What this tool counts is what vLLM allocates.

`vllm.json` holds what vLLM 0.32's own classes allocate: `tests/engines/vllm_sizes.py` builds the model from its config
on the meta device, as one of so many ranks, and asks the KV cache planner. `tests/engines/test_fit_against_vllm.py`
asks the installed vLLM again.
"""

import pytest

from tests.memory.reference import FAMILIES, IN_INT8, RECORDED, family, family_in_int8, gemma4_31b
from w8a8.checkpoint import Checkpoint
from w8a8.memory import kv
from w8a8.memory.kv import kv_cache
from w8a8.memory.layers import Layer
from w8a8.memory.model import Model
from w8a8.memory.weights import weights_per_gpu
from w8a8.memory.working import rotary_bytes

UNNAMED = 4096
"""Bytes that vLLM holds beside the tensors of the files: a zero point here, a scalar in FP32 there."""

UNNAMED_IN_INT8 = 64
"""The same in a small model: a zero point of 2 bytes or so in each layer."""

LATENT_COPIES = {"deepseek_v3": 2 * 2 * 128 * 32}
"""Bytes of the copies of `kv_b_proj` in BF16 that vLLM makes once it has loaded, which is more than the record asks."""

NOT_SPLIT_HERE = {"gemma4_unified": 20784, "minimax_m2": 288, "zamba2": 4096}
"""Bytes counted too much: a patch embedding, norms of all heads together, and adapters, which vLLM splits."""

TOWER_TABLE = {"qwen3_5": 98304}
"""The rotary table of Qwen's vision tower, of which no config tells."""


def counted(
    checkpoint: Checkpoint, gpus: int, context: int, *, text_only: bool = False, kv_bytes: int = 2
) -> dict[str, int]:
    """The same figures as `vllm_sizes.py` prints."""
    model = Model.read(checkpoint)
    cache = kv_cache(model.layers, gpus, kv_bytes)
    return {
        "weights": weights_per_gpu(model, gpus, text_only=text_only),
        "rotary": rotary_bytes(model),
        "block": cache.block_bytes,
        "blocks": cache.blocks(context, 2048),
    }


@pytest.mark.parametrize(
    ("name", "gpus"), [(name, int(gpus)) for name in FAMILIES for gpus in RECORDED["families"][name]["vllm"]]
)
def test_every_family_is_counted_as_vllm_allocates_it(name: str, gpus: int) -> None:
    expected = RECORDED["families"][name]["vllm"][str(gpus)]
    found = counted(family(name), gpus, context=64)
    assert found["weights"] - expected["weights"] in range(NOT_SPLIT_HERE.get(name, 0) + 1)
    assert found["rotary"] == expected["rotary"] - TOWER_TABLE.get(name, 0)
    assert (found["block"], found["blocks"]) == (expected["block"], expected["blocks"])


@pytest.mark.parametrize("gpus", [1, 2, 4])
@pytest.mark.parametrize("name", IN_INT8)
def test_experts_latents_and_states_in_int8_are_counted_as_vllm_allocates_them(name: str, gpus: int) -> None:
    expected = RECORDED["families"][name]["int8"][str(gpus)]
    found = counted(family_in_int8(name), gpus, context=64)
    assert expected["weights"] - found["weights"] + LATENT_COPIES.get(name, 0) // gpus in range(UNNAMED_IN_INT8 + 1)
    assert {**found, "weights": 0} == {**expected, "weights": 0}


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("case", list(RECORDED["gemma4_31b"]["vllm"]))
def test_gemma4_31b_is_counted_as_vllm_allocates_it(case: str, gpus: int) -> None:
    recorded = RECORDED["gemma4_31b"]["vllm"][case]
    if str(gpus) not in recorded:
        return
    name = case.partition(",")[0]
    found = counted(
        gemma4_31b(None if name == "bf16" else name),
        gpus,
        context=131072 if "131072" in case else 8192,
        text_only="text only" in case,
        kv_bytes=1 if "fp8" in case else 2,
    )
    expected = recorded[str(gpus)]
    assert abs(found.pop("weights") - expected["weights"]) <= UNNAMED
    assert found == {key: expected[key] for key in found}


def test_gemma3_270m_has_as_many_tokens_of_cache_as_vllm_says_when_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a CPU, VLLM_CPU_KVCACHE_SPACE=1, 4,096 tokens: "81,621 tokens, Maximum concurrency ... 19.93x"."""
    monkeypatch.setattr(kv, "BLOCK_TOKENS", 128)
    monkeypatch.setattr(kv, "CONCURRENT_BATCHES", 1)
    layers = [Layer("full" if i % 6 == 5 else "sliding", 1, 256, 0 if i % 6 == 5 else 512) for i in range(18)]
    cache = kv_cache(tuple(layers), 1, 2)
    requests = 2**30 // cache.block_bytes / cache.blocks(4096, 2048)
    assert round(requests, 2) == 19.93
    assert int(requests * 4096) == 81621
