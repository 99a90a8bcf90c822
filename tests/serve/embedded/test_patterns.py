"""A response template's patterns run for a bounded time: an answer that keeps one busy is text."""

import asyncio
import time
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig

from w8a8.serve.embedded import patterns
from w8a8.serve.embedded.patterns import response_parser
from w8a8.serve.embedded.stream import Stream

pytestmark = pytest.mark.slow

ENDLESS = r"(?:a|a|aa)+[^a]z"
"""Tries every way to split a run of `a`: more than a million for each 20."""

CALL: dict[str, Any] = {
    "open": "<call>",
    "close": "</call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {"tag_pattern": r"(?P<key>\w)=(?P<value>\w)"},
    "transform": {"type": "function", "function": {"name": "f", "arguments": "{content}"}},
}
SOUND: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<start>",
    "fields": {"tool_calls": CALL, "content": {"content": "text"}},
}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.3)


def spelled(**fields: Any) -> dict[str, Any]:
    return {**SOUND, "fields": {**SOUND["fields"], **fields}}


def said(template: dict[str, Any], text: str) -> str:
    """What an answer that says `text`, letter by letter, is made of: text, and the arguments of calls."""
    core = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    core.decoder = decoders.Fuse()

    async def run() -> str:
        config = GenerationConfig(max_new_tokens=len(text), eos_token_id=0)
        parser = response_parser(template, "<start>", None)
        stream = Stream({"input_ids": torch.tensor([[1]])}, config, core, None, parser)
        for letter in text:
            stream.take(ord(letter))
        return "".join([str(getattr(item, "arguments", item)) async for item in stream.items()])

    return asyncio.run(run())


def test_a_sound_template_parses_as_ever() -> None:
    assert said(SOUND, "Hi <call>a=b</call>you") == 'Hi {"a": "b"}you'


def test_an_answer_that_keeps_a_pattern_busy_is_text() -> None:
    template = spelled(reasoning_content={"open_pattern": ENDLESS, "close": "</", "content": "text"})
    text = "Hi " + "a" * 60
    begin = time.monotonic()
    assert said(template, text) == text
    assert time.monotonic() - begin < 30


def test_a_call_that_keeps_its_pattern_busy_is_text() -> None:
    call = CALL | {"content_args": {"tag_pattern": rf"(?P<key>{ENDLESS})(?P<value>)"}}
    assert said(spelled(tool_calls=call), f"Hi <call>{'a' * 60}</call>you") == f"Hi <call>{'a' * 60}</call>you"


def test_a_prompt_that_keeps_the_anchor_busy_is_refused() -> None:
    template = {
        **{name: value for name, value in SOUND.items() if name != "start_anchor"},
        "start_anchor_pattern": ENDLESS,
    }
    with pytest.raises(TimeoutError):
        response_parser(template, "a" * 60, None)
