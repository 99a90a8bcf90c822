"""Waiting prompts are read together, in one forward, and each gets the tokens that it gets alone."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from transformers import GenerationConfig

from tests.serve.embedded.test_batching import VOCABULARY, alone, answer, gemma3, gemma4, llama, prompts, settings
from tests.serve.embedded.test_batching import _one_thread as _one_thread
from tests.serve.embedded.test_batching import tokenizer as tokenizer
from tests.serve.embedded.test_caches import gemma2
from w8a8.serve.embedded import batching
from w8a8.serve.embedded.batching import Batcher

pytestmark = pytest.mark.slow


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().eval()


def held(
    model: Any, tokenizer: Any, first: list[int], asked: Sequence[tuple[list[int], GenerationConfig]]
) -> tuple[list[Any], list[int]]:
    """Answers to requests that all wait while the prompt `first` is read, and the tokens of each forward from there."""
    entered, waiting = threading.Event(), threading.Event()
    sizes: list[int] = []

    def hold(_: Any, __: Any, given: Any) -> None:
        sizes.append(given["input_ids"].numel())
        entered.set()
        assert waiting.wait(60)

    async def every() -> list[Any]:
        batcher = Batcher(model, context=256)
        hook = model.register_forward_pre_hook(hold, with_kwargs=True)
        try:
            opening = asyncio.create_task(
                answer(batcher, tokenizer, {"input_ids": torch.tensor([first])}, settings(1, eos_token_id=None))
            )
            await asyncio.to_thread(entered.wait)
            tasks = [
                asyncio.create_task(answer(batcher, tokenizer, {"input_ids": torch.tensor([prompt])}, config))
                for prompt, config in asked
            ]
            await asyncio.sleep(0)
            waiting.set()
            return await asyncio.gather(opening, *tasks, return_exceptions=True)
        finally:
            hook.remove()
            batcher.stop()
            batcher.join(10)

    return asyncio.run(every()), sizes


@pytest.mark.parametrize("kind", [llama, gemma3, gemma4])
def test_waiting_prompts_are_read_at_once(kind: Any, tokenizer: Any) -> None:
    model = made(kind)
    first, *others = prompts(5, 3, 40, 1, 17, 25)
    got, sizes = held(model, tokenizer, first, [(prompt, settings(12)) for prompt in others])
    assert sizes[:3] == [5, 3 + 40 + 1 + 17 + 25, 5]
    assert got == [alone(model, first, 1), *(alone(model, prompt, 12, eos_token_id=7) for prompt in others)]


@pytest.mark.parametrize("kind", [llama, gemma3, gemma4])
def test_what_a_turn_cannot_read_is_read_in_the_next(
    kind: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CHUNK", 32)
    model = made(kind)
    first, *others = prompts(5, 20, 70, 3, 30)
    got, sizes = held(model, tokenizer, first, [(prompt, settings(12, eos_token_id=None)) for prompt in others])
    # 20 + 12; a token of the first, 32; 26 + 3 + 3; 27: after each the sequences that are read decode a token
    assert sizes[:9] == [5, 32, 1, 32, 1, 32, 3, 27, 4]
    assert got == [alone(model, first, 1), *(alone(model, prompt, 12, eos_token_id=None) for prompt in others)]


def test_a_model_that_lets_no_sequences_share_a_row_reads_one_after_another(tokenizer: Any) -> None:
    model = made(gemma2)
    first, *others = prompts(5, 3, 40, 17)
    got, sizes = held(model, tokenizer, first, [(prompt, settings(9)) for prompt in others])
    assert sizes[:5] == [5, 3, 40, 17, 3]
    assert got[1:] == [alone(model, prompt, 9, eos_token_id=7) for prompt in others]


def test_of_prompts_read_at_once_one_that_fails_takes_no_other_with_it(tokenizer: Any) -> None:
    model = made(llama)
    first, *others = prompts(5, 3, 40, 17)
    asked = [(prompt, settings(9)) for prompt in others]
    asked.insert(1, ([20, VOCABULARY + 5, 21], settings(9)))
    got, sizes = held(model, tokenizer, first, asked)
    assert sizes[:6] == [5, 3 + 3 + 40 + 17, 3, 3, 40, 17]  # all, which fails, and then each by itself
    assert isinstance(got[2], HTTPException)
    assert got[2].status_code == 503
    del got[2]
    assert got[1:] == [alone(model, prompt, 9, eos_token_id=7) for prompt in others]
