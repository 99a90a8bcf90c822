"""What `fit` says, on models that exist as headers only."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import w8a8
from tests.checkpoints import LLAMA, llama_tensors, write_checkpoint
from tests.memory.reference import FAMILIES, family, gemma4_31b
from tests.named import headers
from w8a8.errors import NoConfigError, NoDeviceError, UsageError, W8A8Error
from w8a8.machine import Gpu, describe
from w8a8.memory import Fit, fit, ram_needed

GIB = 2**30


def test_gemma4_31b_has_the_33_gb_of_weights_that_its_card_says() -> None:
    assert fit(gemma4_31b(), describe("80GiB")).weights / 1e9 == pytest.approx(33, abs=0.5)


def test_gemma4_31b_runs_on_one_48_gb_card_for_short_contexts() -> None:
    found = fit(gemma4_31b(), describe("48GB"), context=4096)
    assert found.fits
    assert 4096 <= found.max_context < found.model_context
    assert not fit(gemma4_31b(), describe("48GB"), context=262144).fits
    assert not fit(gemma4_31b(None), describe("48GB"), context=4096).fits


@pytest.mark.parametrize("format", ["quark", "compressed-tensors"])
def test_gemma4_31b_runs_on_4_cards_of_24_gb_with_8192_tokens(format: str) -> None:  # noqa: A002
    found = fit(gemma4_31b(format), describe("4x24GiB:gfx1100"), context=8192)
    assert found.fits
    assert found.tensor_parallel == 4
    assert found.advice == ()
    assert not fit(gemma4_31b(format), describe("24GiB"), context=1).fits


def test_the_budget_is_the_share_that_is_asked_for() -> None:
    found = fit(gemma4_31b(), describe("4x24GiB"), utilization=0.5)
    assert found.budget == 12 * GIB
    assert not found.fits


@pytest.mark.slow
@settings(max_examples=25)
@given(
    gib=st.integers(36, 200),
    concurrency=st.integers(1, 40),
    text_only=st.booleans(),
    dtype=st.sampled_from(["auto", "fp8"]),
)
def test_the_largest_context_fits_and_one_token_more_does_not(
    gib: int, concurrency: int, text_only: bool, dtype: str
) -> None:
    def at(context: int) -> Fit:
        return fit(
            gemma4_31b(),
            describe(f"{gib}GiB"),
            context=context,
            concurrency=concurrency,
            kv_dtype=dtype,
            text_only=text_only,
        )

    most = at(8192).max_context
    assert most == 0 or at(most).fits
    assert most == 262144 or not at(most + 1).fits


@pytest.mark.slow
@settings(max_examples=25)
@given(gib=st.integers(16, 200), context=st.integers(1, 262144))
def test_the_largest_concurrency_fits_and_one_request_more_does_not(gib: int, context: int) -> None:
    gpus = describe(f"4x{gib}GiB")
    most = fit(gemma4_31b(), gpus, context=context).max_concurrency
    assert most == 0 or fit(gemma4_31b(), gpus, context=context, concurrency=most).fits
    assert not fit(gemma4_31b(), gpus, context=context, concurrency=most + 1).fits


def test_advice_comes_in_order_and_is_true() -> None:
    gpus = describe("48GB")
    found = fit(gemma4_31b(), gpus, context=16384, concurrency=3)
    kinds = ["--context", "--concurrency", "--count", "--kv-dtype fp8", "--text-only", "GiB"]
    assert [next(kind for kind in kinds if kind in line) for line in found.advice] == kinds

    def said(option: str) -> int:
        match = re.search(rf"--{option} (\d+)", " ".join(found.advice))
        assert match
        return int(match[1])

    assert fit(gemma4_31b(), gpus, context=said("context"), concurrency=3).fits
    assert fit(gemma4_31b(), gpus, context=16384, concurrency=said("concurrency")).fits
    count = said("count")
    assert fit(gemma4_31b(), gpus * count, context=16384, concurrency=3).fits
    assert not fit(gemma4_31b(), gpus * (count // 2), context=16384, concurrency=3).fits


def test_a_model_in_bf16_is_told_to_be_quantized_where_that_helps() -> None:
    assert "w8a8 quantize" in fit(gemma4_31b(None), describe("48GiB")).advice[0]
    assert "quantize" not in " ".join(fit(gemma4_31b(None), describe("24GiB")).advice)
    assert "quantize" not in " ".join(fit(gemma4_31b(), describe("24GiB")).advice)


def test_gpus_that_cannot_share_the_heads_are_left_out_and_said() -> None:
    found = fit(gemma4_31b(), describe("3x48GB"))
    assert found.tensor_parallel == 2
    assert "32 attention heads" in found.notices[0]


def test_the_smallest_gpu_decides() -> None:
    gpus = (*describe("48GiB"), *describe("24GiB"))
    found = fit(gemma4_31b(), gpus)
    assert found.memory == 24 * GIB
    assert any("smallest" in notice for notice in found.notices)


def test_more_gpus_never_hold_more_each() -> None:
    needed = [fit(gemma4_31b(), describe(f"{count}x80GiB"), concurrency=8).needed for count in (1, 2, 4, 8, 16)]
    assert needed == sorted(needed, reverse=True)


def test_a_context_beyond_the_models_is_cut_and_said() -> None:
    found = fit(gemma4_31b(), describe("141GiB"), context=10**6)
    assert found.context == 262144
    assert any("262,144" in notice for notice in found.notices)


def test_without_towers_there_is_more_room() -> None:
    both, text = (fit(gemma4_31b(), describe("48GB"), text_only=only) for only in (False, True))
    assert 1.1e9 < both.weights - text.weights < 1.3e9
    assert text.max_context > both.max_context


def test_an_8_bit_cache_is_half_as_large() -> None:
    wide, narrow = (fit(gemma4_31b(), describe("141GiB"), kv_dtype=dtype) for dtype in ("auto", "fp8"))
    assert wide.kv_per_token == 2 * narrow.kv_per_token
    assert wide.kv == 2 * narrow.kv


def test_a_full_attention_layer_keeps_every_token_and_a_window_does_not() -> None:
    found = fit(gemma4_31b(), describe("141GiB"))
    assert found.kv_per_token == 50 * 2 * 16 * 256 * 2 + 10 * 2 * 4 * 512 * 2
    assert found.kv_beyond_window == 10 * 2 * 4 * 512 * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_gets_an_answer(name: str) -> None:
    found = fit(family(name), describe("8GiB"))
    assert found.fits
    assert json.loads(json.dumps(found.to_dict()))["fits"]
    assert 0 < ram_needed(family(name), 64) < 2 * GIB


def test_an_architecture_without_rules_is_answered_with_a_notice() -> None:
    checkpoint = family("llama")
    unknown = headers(
        {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}, {**checkpoint.config, "model_type": "novel"}
    )
    found = fit(unknown, describe("2x8GiB"))
    assert found.weights == fit(checkpoint, describe("2x8GiB")).weights
    assert any("novel" in notice for notice in found.notices)


def test_a_folder_is_read(tmp_path: Path) -> None:
    config = {**LLAMA, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512}
    folder = write_checkpoint(tmp_path / "llama", llama_tensors(), config=config)
    found = w8a8.fit(folder, describe("8GiB"))
    assert (found.name, found.context, found.fits) == ("llama", 512, True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"gpus": ()}, NoDeviceError),
        ({"context": 0}, UsageError),
        ({"concurrency": 0}, UsageError),
        ({"kv_dtype": "int3"}, UsageError),
        ({"utilization": 0.0}, UsageError),
        ({"utilization": 1.1}, UsageError),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(options: dict[str, Any], error: type[W8A8Error]) -> None:
    with pytest.raises(error):
        fit(family("llama"), **{"gpus": describe("8GiB"), **options})


@pytest.mark.parametrize(
    "config",
    [
        {"num_attention_heads": "many"},
        {"num_attention_heads": -4},
        {"num_attention_heads": True},
        {"num_key_value_heads": [4], "head_dim": "x"},
        {"head_dim": 2**60},
        {"max_position_embeddings": 1.5},
        {"layer_types": [], "sliding_window": 8},
        {"layer_types": [{"full": 1}] * 2},
        {"sliding_window": "all"},
    ],
)
def test_a_garbled_config_is_an_error_that_names_it(config: dict[str, Any]) -> None:
    with pytest.raises(NoConfigError, match=r"config\.json says|config\.json does not say"):
        fit(family("llama", **config), describe("8GiB"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.slow
@settings(max_examples=150)
@given(
    name=st.sampled_from(
        ["llama", "gemma3", "gemma4", "gemma4_e2b", "qwen3_5", "phi3", "deepseek_v3", "falcon_h1", "zamba2"]
    ),
    key=st.sampled_from(
        ["text_config", "vision_config", "num_attention_heads", "num_key_value_heads", "head_dim", "layer_types",
         "sliding_window", "sliding_window_pattern", "max_position_embeddings", "rope_parameters", "rope_scaling",
         "num_kv_shared_layers", "linear_key_head_dim", "mamba_ssm_dtype", "quantization_config", "model_type",
         "layers_block_type", "mamba_n_groups", "num_experts_per_tok", "num_nextn_predict_layers", "multi_query",
         "attention_chunk_size", "no_rope_layers", "attn_config", "num_hidden_layers", "position_embedding_type",
         "tie_word_embeddings", "use_sliding_window", "partial_rotary_factor", "use_bidirectional_attention"]
    ),
    value=json_values,
    inside=st.booleans(),
)  # fmt: skip
def test_whatever_a_config_says_there_is_an_answer_or_an_error_of_ours(
    name: str, key: str, value: Any, inside: bool
) -> None:
    config = family(name).config
    text = config.get("text_config")
    changed = {"text_config": {**text, key: value}} if inside and isinstance(text, dict) else {key: value}
    with suppress(W8A8Error):
        assert fit(family(name, **changed), describe("2x8GiB")).needed > 0
        assert ram_needed(family(name, **changed), 64) > 0


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_shapes_tensors_have_there_is_an_answer_or_an_error_of_ours(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["llama", "gemma4", "qwen3_5", "phi3"]))
    checkpoint = family(name)
    tensors = {n: (t.dtype, t.shape) for n, t in checkpoint.tensors.items()}
    victim = data.draw(st.sampled_from(sorted(tensors)))
    tensors[victim] = ("BF16", tuple(data.draw(st.lists(st.integers(0, 2**20), max_size=3))))
    with suppress(W8A8Error):
        assert fit(headers(tensors, checkpoint.config), describe("2x8GiB")).needed > 0


def test_the_embedded_engine_needs_weights_cache_and_a_process() -> None:
    short, long, many = (ram_needed(gemma4_31b(), *case) for case in ((1024, 1), (8192, 1), (8192, 4)))
    assert 33e9 < short < long < many < 60e9
    assert many - long == pytest.approx(3 * (50 * 1024 * 16 * 256 + 10 * 8192 * 4 * 512) * 4, rel=0.05)


def test_in_float32_caches_and_what_is_not_int8_take_twice_the_memory() -> None:
    stored, wide = ([ram_needed(gemma4_31b(), n, dtype=dtype) for n in (1024, 8192)] for dtype in ("auto", "float32"))
    assert wide[1] - wide[0] == 2 * (stored[1] - stored[0])
    halves = sum(tensor.nbytes for tensor in gemma4_31b().tensors.values() if tensor.dtype == "BF16")
    assert halves < wide[0] - stored[0] < halves + stored[1] - stored[0]
    declared = headers(
        {name: (tensor.dtype, tensor.shape) for name, tensor in gemma4_31b().tensors.items()},
        {**gemma4_31b().config, "dtype": "float32"},
    )
    assert ram_needed(declared, 1024) == wide[0]


def test_an_a100_makes_smaller_batches_than_an_h100() -> None:
    h100, a100 = (fit(gemma4_31b(), (Gpu("", 80 * GIB, arch, "nvidia"),)) for arch in ("sm_90", "sm_80"))
    assert a100.activations < h100.activations
