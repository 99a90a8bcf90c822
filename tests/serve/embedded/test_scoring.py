"""Log-probabilities of prompts and answers: those of the model's own logits, in the API's spelling, within bounds."""

import asyncio
from typing import Any

import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.serve.embedded.servers import NAME, message, prompt
from tests.serve.embedded.test_batching import gemma3, gemma4, llama, prompts, qwen35, settings, tokenizer
from w8a8.serve.embedded import batching, scoring
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.prompts import Prompts
from w8a8.serve.embedded.protocol import CompletionRequest
from w8a8.serve.embedded.spelled import spell, spell_bytes
from w8a8.serve.embedded.stream import Stream

__all__ = ["tokenizer"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gemma3, gemma4, qwen35])
def test_a_prompt_and_its_answer_are_scored_as_transformers_would(
    make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    monkeypatch.setattr(batching, "CHUNK", 16)
    monkeypatch.setattr(scoring, "VALUES", 5 * model.config.get_text_config().vocab_size + 1)
    shapes = []

    def heard(_model: Any, _inputs: Any, output: Any) -> None:
        shapes.append(output.logits.shape[1])

    model.register_forward_hook(heard)
    asked = prompts(37, 1, 16)
    streams = asyncio.run(scored(model, tokenizer, asked, max_new_tokens=4))
    read, shapes[:] = max(shapes), []
    assert read == 5  # and no more at once, though a chunk has 16
    for ids, stream in zip(asked, streams, strict=True):
        text = torch.tensor([ids + stream.tokens])
        with torch.inference_mode():
            truth = model(input_ids=text, use_cache=False).logits[0].float().log_softmax(-1)
        following = text[0, 1:].tolist()
        assert [found.token for found in stream.scores] == following
        ours = torch.tensor([found.logprob for found in stream.scores])
        torch.testing.assert_close(ours, truth[range(len(following)), following], atol=2e-5, rtol=0)
        for found, row in zip(stream.scores, truth, strict=False):
            best = row.topk(3)
            assert [token for token, _ in found.likeliest] == best.indices.tolist()
            torch.testing.assert_close(torch.tensor([p for _, p in found.likeliest]), best.values, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_prompt_can_be_scored_without_an_answer(tokenizer: Any) -> None:
    model = llama().eval()
    (stream,) = asyncio.run(scored(model, tokenizer, prompts(256), max_new_tokens=0))  # all of the context
    assert (stream.tokens, stream.finish_reason, len(stream.scores)) == ([], "length", 255)


async def scored(model: Any, tokenizer: Any, asked: list[list[int]], max_new_tokens: int) -> list[Stream]:
    batcher = Batcher(model, context=256)

    async def one(ids: list[int]) -> Stream:
        config = settings(1, eos_token_id=None, do_sample=False)
        config.echo, config.logprobs, config.max_new_tokens = True, 3, max_new_tokens
        stream = batcher.submit({"input_ids": torch.tensor([ids])}, config, tokenizer._tokenizer)
        assert [item async for item in stream.items()] or not max_new_tokens
        return stream

    try:
        return await asyncio.gather(*map(one, asked))
    finally:
        batcher.stop()
        batcher.join(10)


@pytest.mark.slow
def test_logits_that_hold_nan_are_an_error_and_ruled_out_tokens_are_none() -> None:
    (found,) = scoring.score(torch.tensor([[0.0, -torch.inf]]), [1], 2)
    assert (found.logprob, found.likeliest) == (scoring.LEAST, ((0, 0.0), (1, scoring.LEAST)))
    with pytest.raises(ValueError, match="NaN"):
        scoring.score(torch.tensor([[0.0, torch.nan]]), [0], 1)


# --- the API ------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_the_api_spells_them_with_offsets_into_the_text(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 3}
    plain = client.completions.create(prompt=prompt(2), **asked).choices[0]
    assert plain.logprobs is None
    made = client.completions.create(prompt=prompt(2), echo=True, logprobs=4, **asked)
    (choice,) = made.choices
    assert choice.text == prompt(2) + plain.text
    found = choice.logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    assert "".join(found.tokens) == choice.text
    ends = [*found.text_offset[1:], len(choice.text)]
    assert [choice.text[a:b] for a, b in zip(found.text_offset, ends, strict=True)] == found.tokens
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    for token, logprob, tops in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert 4 <= len(tops) <= 5
        assert tops[token] == logprob <= max(tops.values()) <= 0
    assert all(
        logprob == max(tops.values())
        for logprob, tops in zip(found.token_logprobs[-3:], found.top_logprobs[-3:], strict=True)
    )
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (7, 3)
    # Tokens are scored as the text that they spell; what is not echoed is not scored; nothing need be answered.
    ids = [int(word[1:]) for word in prompt(2).split()]
    assert client.completions.create(prompt=ids, echo=True, logprobs=4, **asked).choices[0] == choice
    assert client.completions.create(prompt=[ids], **asked).choices[0].text == plain.text
    answer = client.completions.create(prompt=ids, logprobs=0, **asked).choices[0].logprobs
    assert answer is not None
    assert (answer.tokens, answer.token_logprobs) == (found.tokens[-3:], found.token_logprobs[-3:])
    assert answer.text_offset == [offset - len(prompt(2)) for offset in found.text_offset[-3:]]
    nothing = client.completions.create(prompt=ids, echo=True, logprobs=0, **{**asked, "max_tokens": 0}).choices[0]
    assert (nothing.text, nothing.finish_reason) == (prompt(2), "length")
    assert nothing.logprobs is not None
    assert nothing.logprobs.token_logprobs == found.token_logprobs[:-3]


@pytest.mark.engine
def test_a_chat_is_told_what_a_completion_of_its_prompt_is(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "temperature": 0, "max_tokens": 5}
    truth = client.completions.create(prompt=" w8 w7 w9", logprobs=4, **asked).choices[0]
    assert truth.logprobs is not None
    chat: dict[str, Any] = {"messages": message(" w8 w7"), "logprobs": True, **asked}
    whole = client.chat.completions.create(top_logprobs=4, **chat).choices[0]
    assert whole.message.content == truth.text
    assert whole.logprobs is not None
    found = whole.logprobs.content
    assert found is not None
    assert [entry.token for entry in found] == truth.logprobs.tokens
    assert [entry.logprob for entry in found] == pytest.approx(truth.logprobs.token_logprobs, abs=1e-5)
    for entry, tops in zip(found, truth.logprobs.top_logprobs or [], strict=True):
        assert entry.bytes == list(entry.token.encode())
        assert {top.token: top.logprob for top in entry.top_logprobs} == pytest.approx(tops, abs=1e-5)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert all(top.bytes == list(top.token.encode()) for top in entry.top_logprobs)
    # None is asked for; nor is any told where they are not.
    alone = client.chat.completions.create(**chat).choices[0].logprobs
    assert alone is not None
    assert [(e.logprob, e.top_logprobs) for e in alone.content or []] == [
        (pytest.approx(entry.logprob, abs=1e-5), []) for entry in found
    ]
    assert client.chat.completions.create(**{**chat, "logprobs": False}).choices[0].logprobs is None
    # Streamed, each piece of the text comes with its own tokens.
    chunks = list(client.chat.completions.create(top_logprobs=4, stream=True, **chat))
    streamed: list[Any] = []
    for chunk in chunks:
        (choice,) = chunk.choices
        pieces = (choice.logprobs and choice.logprobs.content) or []
        assert "".join(entry.token for entry in pieces) == (choice.delta.content or "")
        streamed += pieces
    assert [entry.token for entry in streamed] == [entry.token for entry in found]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in found], abs=1e-5)
    assert [entry.top_logprobs[0].token for entry in streamed] == truth.logprobs.tokens


def sentencepiece() -> Tokenizer:
    """Words that begin with a space, as Llama 2 has them: the decoder drops that of the first one."""
    words = ["<unk>", "<s>", "▁", "▁the", "he", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return core


@pytest.mark.slow
def test_tokens_and_their_bytes_add_up_to_the_text() -> None:
    text = "a the 🍐é \ufffd the"
    core = spaced()._tokenizer
    ids = core.encode(text, add_special_tokens=False).ids
    assert [spell(core, token) for token in ids].count("\ufffd") == 4 + 2 + 3  # each a byte
    assert bytes(byte for token in ids for byte in spell_bytes(core, token)).decode() == text
    core = sentencepiece()
    ids = [core.token_to_id(name) for name in ["▁the", "▁", "▁the", "he", "<0xC3>", "<0xA9>"]]
    assert core.decode(ids) == "the  thehe\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert [spell(core, token) for token in ids] == [" the", " ", " the", "he", "\ufffd", "\ufffd"]
    joined = bytes(byte for token in ids for byte in spell_bytes(core, token)).decode()
    assert joined == f" {core.decode(ids)}"


class Model:
    """As much of a model as prompts need."""

    device = torch.device("cpu")
    config = type("Config", (), {"get_text_config": lambda *_, **__: type("Text", (), {"vocab_size": 1000})})()


def spaced() -> Any:
    """Bytes and words, whose spans leave the space before them out; a beginning and an end are added."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", *alphabet, "Ġt", "he", "Ġthe"])}
    core = Tokenizer(models.BPE(vocabulary, [("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    ends = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    core.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), ends])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.slow
def test_tokens_begin_where_the_one_before_ends_also_within_a_character() -> None:
    words = spaced()
    text = "a the 🍐é the"

    async def made(prompt: Any) -> Any:
        prompts = Prompts("m", Model(), words, context=64, sees=False)
        try:
            return await prompts.of_completion(CompletionRequest.parse({"prompt": prompt, "echo": True}))
        finally:
            prompts.close()

    of_text = asyncio.run(made(text))
    ids = of_text.inputs["input_ids"][0].tolist()
    assert of_text.inputs.keys() <= {"input_ids", "attention_mask", "token_type_ids"}
    assert of_text.text == text
    #                        <s> a  the sp  four bytes  two   the  </s>
    assert of_text.begins == (0, 0, 1, 5, 6, 6, 6, 6, 7, 7, 8, 12)
    assert words.decode(ids, skip_special_tokens=True) == text
    of_tokens = asyncio.run(made(ids))
    assert of_tokens.text == f"<s>{text}</s>"
    #                          a character is there with its last byte
    assert of_tokens.begins == (0, 3, 4, 8, 9, 9, 9, 9, 10, 10, 11, 15)
    assert asyncio.run(made([5])).inputs["input_ids"].tolist() == [[5]]
