"""The KL divergence: against a plain computation, on real models, layer by layer, and what is refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from tests.evals.kld.llamas import LETTERS, PROSE, WORDS, make_llama, measure
from w8a8.checkpoint import Checkpoint
from w8a8.errors import DoesNotFitError, EngineError, SourceNotFoundError, UsageError
from w8a8.evals.kld import run as kld
from w8a8.evals.kld.models import CHUNK_BYTES, Predictor, score
from w8a8.evals.kld.run import bands, block_starts, histogram, prepare, run
from w8a8.evals.kld.windows import Window
from w8a8.memory import ram_needed
from w8a8.texts.files import Text

pytestmark = pytest.mark.slow


def plain_log_probabilities(model: Any, ids: tuple[int, ...]) -> Any:
    """`[tokens, vocabulary]` after each of `ids`, in NumPy, all at once."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# --- what is computed ---------------------------------------------------------------------------------------------


def test_every_figure_is_what_a_plain_computation_gives(
    pair: tuple[Path, Path], predictors: tuple[Predictor, Predictor]
) -> None:
    job = prepare(*pair, LETTERS, context=20)
    result = run(job)
    kl, agree, nll = [], [], []
    for window in job.windows:
        p, q = (plain_log_probabilities(each.model, window.ids[:-1]) for each in predictors)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        nll.append([-each[range(window.scored), window.ids[1:]] for each in (p, q)])
    every = np.concatenate(kl)
    assert result.tokens == len(every) == sum(map(len, LETTERS.documents))
    assert result.mean == pytest.approx(every.mean(), rel=1e-5)
    assert result.median == pytest.approx(np.median(every), rel=1e-5)
    assert result.p99 == pytest.approx(np.quantile(every, 0.99), rel=1e-5)
    assert result.max == pytest.approx(every.max(), rel=1e-5)
    assert result.agreement == np.concatenate(agree).mean()
    perplexities = np.exp(np.concatenate(nll, axis=1).mean(axis=1))
    assert (result.reference_perplexity, result.candidate_perplexity) == pytest.approx(perplexities, rel=1e-5)
    assert result.positions[0].mean_kl == pytest.approx(np.concatenate([each[:16] for each in kl]).mean(), rel=1e-5)
    assert [(band.first, band.last) for band in result.positions] == [(0, 15), (16, 18)]
    assert sum(band.tokens for band in result.positions) == len(every)
    assert sum(count for _, _, count in result.histogram) == len(every)
    assert result.mean_interval[0] < result.mean < result.mean_interval[1]


def test_the_order_of_the_models_matters(pair: tuple[Path, Path]) -> None:
    there, back = measure(pair[0], pair[1]), measure(pair[1], pair[0])
    assert there.mean != pytest.approx(back.mean, rel=1e-3)
    assert there.reference_perplexity == back.candidate_perplexity


@settings(max_examples=10)
@given(rows=st.integers(1, 80))
def test_how_many_positions_are_computed_at_once_changes_nothing(
    predictors: tuple[Predictor, Predictor], rows: int
) -> None:
    some = [Window(tuple(i * 7 % len(WORDS) for i in range(60)), 0), Window((0, 5, 6), 1)]
    whole, parts = (score(*predictors, some, chunk_values=n * len(WORDS)) for n in (100, rows))
    assert parts.position.tolist() == [*range(59), 0, 1]
    assert parts.agree.tolist() == whole.agree.tolist()
    for name in ("kl", "reference_nll", "candidate_nll"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-9)


def test_a_model_is_at_no_distance_from_itself(pair: tuple[Path, Path]) -> None:
    result = measure(pair[0], pair[0])
    assert (result.mean, result.max, result.mean_interval) == (0, 0, (0, 0))
    assert (result.agreement, result.agreement_interval) == (1, (1, 1))
    assert result.reference_perplexity == result.candidate_perplexity
    assert result.histogram == ((0.0, 1e-6, result.tokens),)


def test_the_same_command_gives_the_same_result(pair: tuple[Path, Path]) -> None:
    once, again = (measure(*pair).to_dict() for _ in range(2))
    del once["seconds"], again["seconds"]
    assert once == again


def test_logits_in_pieces_are_the_models_own_soft_cap_included(gemma4: Path) -> None:
    predictor = Predictor("gemma4", gemma4)
    predictor.model.config.get_text_config().final_logit_softcapping = 3.0
    ids = list(range(3, 80))
    with torch.inference_mode():
        whole = predictor.model(input_ids=torch.tensor([ids])).logits[0]
    assert 1 < whole.abs().max() <= 3
    pieces = list(predictor.logits(ids, 10))
    assert [len(piece) for piece in pieces] == [10] * 7 + [7]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0.02, atol=0.02)
    with torch.inference_mode():
        after = predictor.model(input_ids=torch.tensor([ids])).logits[0]
    assert torch.equal(whole, after), "the model is left as it was"


def test_gemma_3_270m_in_w8a8_is_near_the_original(gemma3: Path, gemma3_formats: Mapping[str, Path]) -> None:
    result = measure(gemma3, gemma3_formats["quark"], Text("prose", (PROSE,)))
    assert 0.002 < result.mean < 0.1
    assert result.agreement > 0.8
    assert result.candidate_perplexity == pytest.approx(result.reference_perplexity, rel=0.15)
    assert 5 < result.reference_perplexity < 50
    assert result.versions["torch"]


def test_a_gemma_that_sees_reads_plain_text(gemma4: Path, gemma4_w8a8: Path) -> None:
    result = measure(gemma4, gemma4_w8a8, Text("prose", (PROSE,)), context=64)
    assert 0 < result.mean < 1


# --- statistics ---------------------------------------------------------------------------------------------------


def test_blocks_end_where_windows_do_and_are_at_most_an_eighth_of_the_text() -> None:
    text = (Window(tuple(range(301)), 0), Window(tuple(range(1001)), 1))
    assert block_starts(text).tolist() == [0, 128, 256, *range(300, 1300, 128)]
    assert block_starts((Window(tuple(range(65)), 0),)).tolist() == list(range(0, 64, 8))


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50))
def test_every_value_has_its_bin(values: list[float]) -> None:
    kl = np.array(values)
    bins = histogram(kl)
    assert all(low < high for low, high, _ in bins)
    assert [low for low, _, _ in bins[1:]] == [high for _, high, _ in bins[:-1]]
    assert [count for *_, count in bins] == [int(((kl >= low) & (kl < high)).sum()) for low, high, _ in bins]
    assert sum(count for *_, count in bins) == len(values)
    assert len(bins) == 1 or bins[-1][2]


@given(st.integers(1, 5000))
def test_bands_cover_every_position_once(length: int) -> None:
    found = bands(np.arange(length), np.arange(length, dtype=float))
    assert found[0].first == 0
    assert found[-1].last == length - 1
    assert [band.first for band in found[1:]] == [band.last + 1 for band in found[:-1]]
    assert all(band.mean_kl == (band.first + band.last) / 2 for band in found)


# --- layer by layer -----------------------------------------------------------------------------------------------


def test_streamed_the_result_is_the_same(pair: tuple[Path, Path]) -> None:
    steps: list[int] = []
    plain = measure(*pair, context=16)
    job = prepare(*pair, LETTERS, context=16, stream=True)
    streamed = run(job, advance=steps.append)
    assert replace(streamed, seconds=plain.seconds) == plain
    assert sum(steps) == job.steps == 5 * job.tokens


@pytest.mark.parametrize("stream", [False, True])
def test_in_float32_what_bf16_rounds_does_not_count(pair: tuple[Path, Path], tmp_path: Path, stream: bool) -> None:
    stored = make_llama(tmp_path / "bf16", seed=1)
    LlamaForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).save_pretrained(stored)
    wide = tmp_path / "float32"
    shutil.copytree(stored, wide)
    LlamaForCausalLM.from_pretrained(stored, dtype=torch.float32).save_pretrained(wide)

    rounded = measure(wide, stored, stream=stream)
    exact = measure(wide, stored, stream=stream, dtypes=("float32", "float32"))
    assert exact.mean == 0 < rounded.mean
    assert exact.to_dict()["dtypes"] == ["float32", "float32"]
    again = measure(stored, wide, stream=stream, dtypes=("float32", "bfloat16"))
    assert again.mean == pytest.approx(rounded.mean)


def test_in_float32_a_bf16_model_needs_twice_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = make_llama(tmp_path / "bf16", hidden_size=512)
    LlamaForCausalLM.from_pretrained(stored, dtype=torch.bfloat16).save_pretrained(stored)
    size = sum(tensor.nbytes for tensor in Checkpoint.open(stored).tensors.values())
    needed = 2 * ram_needed(stored, 16) + CHUNK_BYTES
    monkeypatch.setattr(kld, "available_memory", lambda: needed + size)
    assert not prepare(stored, stored, LETTERS, context=16).streamed
    assert not prepare(stored, stored, LETTERS, context=16, dtypes=(None, "float32")).streamed
    assert prepare(stored, stored, LETTERS, context=16, dtypes=("float32", "float32")).streamed


def test_the_real_gemma_3_streams(gemma3: Path, gemma3_formats: Mapping[str, Path]) -> None:
    text = Text("prose", (PROSE,))
    plain, streamed = (
        run(prepare(gemma3, gemma3_formats["quark"], text, context=32, stream=stream)) for stream in (False, True)
    )
    assert replace(streamed, seconds=plain.seconds) == plain


def test_models_too_large_for_memory_are_streamed_unasked(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kld, "available_memory", lambda: 2 * 10**9)
    assert prepare(*pair, LETTERS).streamed


# --- what is refused ----------------------------------------------------------------------------------------------


def test_models_of_different_vocabularies_are_not_compared(pair: tuple[Path, Path], tmp_path: Path) -> None:
    larger = make_llama(tmp_path / "larger", vocab_size=len(WORDS) + 1)
    with pytest.raises(UsageError, match="knows 31 tokens"):
        prepare(pair[0], larger, LETTERS)
    shuffled = make_llama(tmp_path / "shuffled", words=["<s>", *WORDS[:0:-1]])
    with pytest.raises(UsageError, match="different tokens"):
        prepare(pair[0], shuffled, LETTERS)
    without_bos = make_llama(tmp_path / "plain", bos=False)
    with pytest.raises(UsageError, match="different tokens"):
        prepare(pair[0], without_bos, LETTERS)


def test_a_window_longer_than_the_model_reads_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="512 tokens at most"):
        prepare(*pair, LETTERS, context=513)


def test_an_empty_text_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="no token"):
        prepare(*pair, Text("empty", ("",)))


def test_models_that_fit_neither_together_nor_by_layers_are_refused(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kld, "available_memory", lambda: 10**9)
    with pytest.raises(DoesNotFitError, match=r"layer by layer, need about .* 1\.0 GB are available"):
        prepare(*pair, LETTERS)


def test_what_is_no_checkpoint_or_no_language_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SourceNotFoundError):
        prepare(pair[0], tmp_path / "nothing", LETTERS)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EngineError, match="config"):
        prepare(pair[0], tmp_path, LETTERS)
    body = json.loads((pair[0] / "config.json").read_text()) | {"architectures": ["LlamaModel"]}
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(EngineError, match="tokenizer"):
        prepare(pair[0], tmp_path, LETTERS)
    (tmp_path / "model.safetensors").symlink_to(pair[0] / "model.safetensors")
    with pytest.raises(EngineError, match="predicts no tokens"):
        Predictor("body", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(body | {"architectures": ["Invented"]}))
    with pytest.raises(EngineError, match="no architecture Invented"):
        Predictor("invented", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named_with_their_place(
    predictors: tuple[Predictor, Predictor], pair: tuple[Path, Path], value: float
) -> None:
    broken = Predictor("broken", pair[1])
    spoil = torch.tensor([3])
    broken.model.model.norm.register_forward_hook(
        lambda _m, _i, states: states.index_fill(1, spoil, value) if states.shape[1] > 3 else states
    )
    with pytest.raises(EngineError, match=r"broken: the logits .* at position 3 of window 1 \(document 7\)"):
        score(predictors[0], broken, [Window((0, 1, 2), 6), Window((0, 1, 2, 5, 4), 7)], chunk_values=2 * len(WORDS))


def test_a_token_that_one_model_rules_out_has_no_divergence(
    predictors: tuple[Predictor, Predictor], pair: tuple[Path, Path]
) -> None:
    never, too = Predictor("never", pair[1]), Predictor("too", pair[1])
    for each in (never, too):
        each.model.lm_head.register_forward_hook(lambda _m, _i, out: out.index_fill(-1, torch.tensor(5), -torch.inf))
    with pytest.raises(EngineError, match=r"rules out a token .* at position 0"):
        score(predictors[0], never, [Window((0, 1, 2), 0)])
    assert score(never, too, [Window((0, 1, 2), 0)]).kl.tolist() == [0, 0]
