"""An answer is the same whole and streamed: cut characters, whitespace at the end, calls, and calls that are none."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig
from transformers.utils.chat_parsing import ResponseParser

from w8a8.serve.embedded.answers import Chat, Completion
from w8a8.serve.embedded.stream import Stream

pytestmark = pytest.mark.slow

WORDS = [
    "<call>",
    "</call>",
    "<end>",
    '{"name": "f", "arguments": {"a": 1}}',
    "{",
    "Hi",
    " ",
    "\n",
    "<think>",
    "</think>",
]
EMOJI = "🍐".encode()
END = WORDS.index("<end>")
TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<start>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*<end>", "content": "text"},
    },
}


def tokenizer() -> Tokenizer:
    """Words, and every byte as a token."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *(f"<0x{byte:02X}>" for byte in range(256))])}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def answers(
    said: Sequence[str | int], *, parsed: bool, limit: int = 100, likeliest: int | None = None
) -> tuple[Any, list[Any]]:
    """The choice of a whole answer, and the choices of a streamed one, for words and bytes that a model says."""
    core = tokenizer()
    vocabulary = core.get_vocab()
    ids = [vocabulary[word if isinstance(word, str) else f"<0x{word:02X}>"] for word in said]

    def stream() -> Stream:
        config = GenerationConfig(max_new_tokens=limit, eos_token_id=END)
        config.logprobs = likeliest
        made = Stream(
            {"input_ids": torch.tensor([[1]])},
            config,
            core,
            None,
            ResponseParser(TEMPLATE, prefix="") if parsed else None,
        )
        for token in ids:
            if not made.done:
                made.take(token, torch.eye(len(vocabulary))[token])
        return made

    async def both() -> tuple[Any, list[Any]]:
        spelling = Chat("1", "m") if parsed else Completion("1", "m")
        done = stream()
        whole = spelling.whole([item async for item in done.items()], done)
        events = [event.removeprefix("data: ") async for event in spelling.events(stream(), with_usage=False)]
        assert events.pop() == "[DONE]\n\n"
        return whole["choices"][0], [json.loads(event)["choices"][0] for event in events]

    return asyncio.run(both())


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (["Hi", " ", "\n", "<end>"], "Hi \n"),
        ([*EMOJI, "<end>"], "🍐"),
    ],
)
def test_a_text_is_the_same_whole_and_streamed(said: list[str | int], text: str) -> None:
    whole, chunks = answers(said, parsed=False)
    assert whole["text"].removesuffix("<end>") == text
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "stop"


def test_an_answer_cut_in_the_middle_of_a_character_is_the_same_whole_and_streamed() -> None:
    whole, chunks = answers(["Hi", " ", *EMOJI], parsed=False, limit=4)
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] == "Hi "
    whole, chunks = answers(["Hi", " ", *EMOJI], parsed=True, limit=4)
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == whole["message"]["content"] == "Hi "
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "length"


def test_reasoning_and_calls_are_the_same_whole_and_streamed() -> None:
    said = ["<think>", "Hi", "\n", "</think>", "Hi", " ", "<call>", WORDS[3], "</call>", "<end>"]
    whole, chunks = answers(said, parsed=True)
    message = whole["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hi\n", "Hi")
    [call] = message["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert [call for delta in deltas for call in delta.get("tool_calls", [])] == [{"index": 0, **call}]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"


def test_log_probabilities_come_with_the_text_of_their_tokens() -> None:
    said = ["<think>", "Hi", "</think>", *EMOJI, "Hi", "<end>"]
    whole, chunks = answers(said, parsed=True, likeliest=2)
    entries = whole["logprobs"]["content"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == "<think>Hi</think>🍐Hi<end>"
    assert [entry["token"] for entry in entries[3:7]] == ["\ufffd"] * 4
    for entry in entries:
        assert [len(entry["top_logprobs"]), entry["top_logprobs"][0]["bytes"]] == [2, entry["bytes"]]
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] > entry["top_logprobs"][1]["logprob"]
    pieces = [(chunk["delta"], chunk["logprobs"]["content"]) for chunk in chunks if chunk["logprobs"]]
    assert [entry for _, found in pieces for entry in found] == entries
    assert [found for delta, found in pieces if delta == {"content": "🍐"}] == [entries[2:7]]  # all that it waited for
    assert chunks[-1]["logprobs"]["content"] == entries[-1:]  # the end has no text, and stands for itself
    unasked, chunks = answers(said, parsed=True)
    assert unasked["logprobs"] is None is chunks[-1]["logprobs"]


def test_an_answer_that_cannot_be_chosen_fails_alone() -> None:
    """One whose scores are no probabilities, which would end a whole batch."""

    async def choose() -> None:
        config = GenerationConfig(max_new_tokens=3, do_sample=True)
        stream = Stream({"input_ids": torch.tensor([[1]])}, config, tokenizer())
        stream.choose(torch.full((300,), torch.nan))
        assert stream.done
        with pytest.raises(HTTPException) as failed:
            [item async for item in stream.items()]
        assert failed.value.status_code == 503

    asyncio.run(choose())


@pytest.mark.parametrize(("end", "reason"), [(["</call>", "Hi", "<end>"], "stop"), ([], "length")])
def test_a_call_that_is_none_fails_nothing(end: list[str], reason: str) -> None:
    """The model says something that is not JSON, or its tokens end before the call does."""
    said = ["Hi", "<call>", "{", *end]
    whole, chunks = answers(said, parsed=True, limit=len(said))
    assert "tool_calls" not in whole["message"]
    assert whole["message"]["content"].startswith("Hi")
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == whole["message"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"] == reason
