"""Prompts that begin alike: what one has read, the next does not read again, and its answer stays the same."""

import asyncio
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pytest
import torch

from tests.serve.embedded.test_batching import _one_thread as _one_thread
from tests.serve.embedded.test_batching import alone, answer, gemma3, gemma4, llama, prompts, settings
from tests.serve.embedded.test_batching import tokenizer as tokenizer
from tests.serve.embedded.test_caches import gemma2
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.caches import Caches

pytestmark = pytest.mark.slow

LONG = 90
"""Tokens of what prompts begin with: more than the sliding windows of the models."""


def asked(
    model: Any, tokenizer: Any, given: Sequence[Sequence[int]], room: int | None = None
) -> tuple[list[list[int]], list[int]]:
    """Answers to prompts, one after the other, and how many tokens of each prompt were read."""
    read: list[int] = []

    async def every() -> list[list[int]]:
        batcher = Batcher(model, context=256, room=room)
        hook = model.register_forward_pre_hook(
            lambda _, __, named: read.append(named["input_ids"].numel()), with_kwargs=True
        )
        answers, counts = [], []
        try:
            for prompt in given:
                read.clear()
                answers.append(await answer(batcher, tokenizer, {"input_ids": torch.tensor([prompt])}, settings(8)))
                counts.append(sum(read) - (len(answers[-1]) - 1))
        finally:
            hook.remove()
            batcher.stop()
            batcher.join(10)
        read[:] = counts
        return answers

    return asyncio.run(every()), read


@pytest.mark.parametrize("kind", [llama, gemma2, gemma3, gemma4])
def test_what_prompts_begin_with_is_read_twice_at_most(kind: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    beginning, *ends = prompts(LONG, 5, 20, 7, 30)
    given = [beginning + end for end in ends]
    answers, read = asked(model, tokenizer, given)
    assert answers == [alone(model, prompt, 8, eos_token_id=7) for prompt in given]
    assert read == [LONG + 5, LONG + 20, 7, 30]  # where they part is known from the second on


def test_a_conversation_that_goes_on_is_read_from_where_it_was(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = gemma3().eval()
    turns = prompts(70, 80, 66, 9)
    given = [[*chain.from_iterable(turns[: i + 1])] for i in range(4)]
    answers, read = asked(model, tokenizer, given)
    assert answers == [alone(model, prompt, 8, eos_token_id=7) for prompt in given]
    assert read == [70, 150, 80 + 66, 66 + 9]  # what was read at the turn before last is there


def test_the_same_prompt_again_reads_its_last_token(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    (prompt,) = prompts(LONG)
    answers, read = asked(model, tokenizer, [prompt] * 3)
    assert answers == [alone(model, prompt, 8, eos_token_id=7)] * 3
    assert read == [LONG, LONG, 1]


def test_a_request_takes_the_memory_of_what_is_kept(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    beginning, other, *ends = prompts(LONG, 150, 5, 20, 7, 9)
    given = [*(beginning + end for end in ends[:3]), other, beginning + ends[3]]
    room = Caches(model).nbytes(LONG + 20 + 8 + LONG)
    answers, read = asked(model, tokenizer, given, room)
    assert answers == [alone(model, prompt, 8, eos_token_id=7) for prompt in given]
    assert read == [LONG + 5, LONG + 20, 7, 150, LONG + 9]  # 150 + 8 tokens fit, but not beside what was kept
