"""Tokens are drawn with the chances that transformers' warpers give them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from w8a8.serve.embedded import sampling
from w8a8.serve.embedded.sampling import let_through, likeliest, sample

VOCABULARY = 3000


def warped(scores: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The chances [vocabulary] by transformers."""
    warpers = LogitsProcessorList()
    if config.temperature is not None:
        warpers.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k is not None:
        warpers.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None:
        warpers.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        warpers.append(MinPLogitsWarper(config.min_p))
    return warpers(None, scores[None])[0].softmax(-1)


def chances(scores: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The same by ours."""
    weights, tokens = let_through(scores, config)
    all_ = torch.zeros_like(scores)
    all_[slice(None) if tokens is None else tokens] = weights / weights.sum()
    return all_


@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    temperature=st.none() | st.floats(0.2, 3),
    top_k=st.none() | st.integers(1, 2 * VOCABULARY),
    top_p=st.none() | st.floats(0.01, 0.999),
    min_p=st.none() | st.floats(0.001, 0.9),
)
def test_every_token_has_the_chance_that_transformers_gives_it(
    seed: int,
    spread: float,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> None:
    scores = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours, theirs = chances(scores, config), warped(scores, config)
    # Sums in another order may leave out, or let through, a token at the very edge: the least of them.
    assert ((ours > 0) != (theirs > 0)).sum() <= 1
    assert (ours - theirs).abs().sum() < 3 * min(ours[ours > 0].min(), theirs[theirs > 0].min()) + 1e-5


def test_few_are_sorted_unless_more_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FEW", 8)
    scores = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    for top_p, few in ((0.01, True), (0.9, False)):
        _, tokens = let_through(scores, GenerationConfig(do_sample=True, top_p=top_p))
        assert tokens is not None
        assert (len(tokens) == 8) is few


def test_draws_follow_the_chances() -> None:
    scores, generator = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    config = GenerationConfig(do_sample=True, top_k=2, temperature=0.5)
    drawn = [sample(scores, config, generator) for _ in range(400)]
    assert set(drawn) == {1, 3}
    assert drawn.count(1) / 400 == pytest.approx(torch.tensor([6.0, 4.0]).softmax(-1)[0].item(), abs=0.06)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    for settings in ({}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(RuntimeError):
            sample(torch.full((4,), torch.nan), GenerationConfig(do_sample=True, **settings))


@given(st.lists(st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 1.0, torch.inf, torch.nan]), min_size=1, max_size=70))
def test_the_likeliest_token_is_torchs_argmax(scores: list[float]) -> None:
    held = torch.tensor(scores)
    assert likeliest(held) == int(held.argmax())


def test_of_many_equal_scores_the_first_is_the_likeliest() -> None:
    scores = torch.zeros(100_003)
    scores[[70_000, 20_000, 90_000]] = 1.0
    with torch.inference_mode():
        assert likeliest(scores + 0) == 20_000
        scores[80_000] = torch.nan
        assert likeliest(scores.requires_grad_()) == 80_000
