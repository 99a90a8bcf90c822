"""The batcher against `model.generate`, one request at a time, on small random models in FP32: the same tokens."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from fastapi import HTTPException
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.real.test_gemma4 import TEXT, TOKENS, VISION
from w8a8.serve.embedded import batching
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.caches import Caches
from w8a8.serve.embedded.stream import StopStrings

pytestmark = pytest.mark.slow

VOCABULARY = 320
EOS = 7
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))


def gemma3() -> Any:
    """Sliding windows that are full long before the answers end."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(**SMALL, layer_types=kinds, sliding_window=16)
    return transformers.Gemma3ForCausalLM(config)


def gemma4() -> Any:
    """Layers that differ in their heads, keys used as values, a vision tower; the last layers share keys and values."""
    more = {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, "max_position_embeddings": 256}
    text = {**TEXT, **more, "eos_token_id": EOS}
    config = transformers.Gemma4Config(text_config=text, vision_config=VISION, audio_config=None, **TOKENS)
    return transformers.Gemma4ForConditionalGeneration(config)


def qwen35() -> Any:
    """Linear attention, whose state cannot be aligned: one request after another."""
    kinds = ["linear_attention", "linear_attention", "full_attention"]
    config = transformers.Qwen3_5TextConfig(**SMALL, layer_types=kinds)
    return transformers.Qwen3_5ForCausalLM(config)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are quicker without a second one, and much quicker on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[llama, gemma3, gemma4, qwen35])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param().eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every token a word of its own: `w12`."""
    core = Tokenizer(models.WordLevel({f" w{i}": i for i in range(VOCABULARY)}, unk_token=" w0"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(8, 290, (n,), generator=generator).tolist() for n in lengths]


def alone(model: Any, prompt: Sequence[int], tokens: int, **config: Any) -> list[int]:
    ids = torch.tensor([prompt])
    answer = model.generate(ids, max_new_tokens=tokens, do_sample=False, **config)[0, len(prompt) :]
    return list(map(int, answer))


def settings(tokens: int, **more: Any) -> GenerationConfig:
    made = GenerationConfig(max_new_tokens=tokens, eos_token_id=more.pop("eos_token_id", EOS), **more)
    made.seed = None
    return made


async def answer(
    batcher: Batcher, tokenizer: Any, inputs: dict[str, torch.Tensor], config: GenerationConfig
) -> list[int]:
    """The token ids of a request, once it has ended."""
    stream = batcher.submit(inputs, config, tokenizer._tokenizer)
    assert "".join([item async for item in stream.items()])
    return stream.tokens


def run(
    model: Any, tokenizer: Any, requests: Sequence[tuple[dict[str, torch.Tensor], GenerationConfig]], apart: float = 0
) -> list[list[int]]:
    """The token ids of every request, sent at once or some seconds apart."""

    async def one(batcher: Batcher, i: int) -> list[int]:
        await asyncio.sleep(i * apart)
        return await answer(batcher, tokenizer, *requests[i])

    async def every() -> list[list[int]]:
        batcher = Batcher(model, context=256)
        try:
            return await asyncio.gather(*(one(batcher, i) for i in range(len(requests))))
        finally:
            batcher.stop()
            batcher.join(10)

    return asyncio.run(every())


def together(
    model: Any, tokenizer: Any, requests: Sequence[tuple[list[int], GenerationConfig]], apart: float = 0
) -> list[list[int]]:
    """`run`, for prompts of text."""
    return run(model, tokenizer, [({"input_ids": torch.tensor([p])}, config) for p, config in requests], apart)


def test_which_models_can_be_batched(model: Any) -> None:
    assert Caches(model).join is (not isinstance(model, transformers.Qwen3_5ForCausalLM))


def test_sixteen_at_once_get_the_tokens_they_get_alone(model: Any, tokenizer: Any) -> None:
    asked = list(zip(prompts(*range(1, 33, 2)), range(40, 24, -1), strict=True))
    got = together(model, tokenizer, [(p, settings(n)) for p, n in asked])
    assert got == [alone(model, p, n, eos_token_id=EOS) for p, n in asked]
    assert len({tuple(answer[:20]) for answer in got}) > 8


def test_requests_that_come_while_others_run_get_the_tokens_they_get_alone(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "CHUNK", 8)  # a long prompt is read in pieces, between the others' tokens
    asked = list(zip(prompts(3, 60, 1, 25, 9), (60, 20, 40, 50, 30), strict=True))
    got = together(model, tokenizer, [(p, settings(n)) for p, n in asked], apart=0.02)
    assert got == [alone(model, p, n, eos_token_id=EOS) for p, n in asked]


def test_more_than_fit_wait_for_their_turn(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MAX_RUNNING", 2)
    asked = list(zip(prompts(3, 5, 7, 9, 11), (9, 3, 6, 1, 4), strict=True))
    got = together(model, tokenizer, [(p, settings(n)) for p, n in asked])
    assert got == [alone(model, p, n, eos_token_id=EOS) for p, n in asked]


def test_an_image_is_seen_beside_requests_of_text(tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = gemma4().eval()
    generator = torch.Generator().manual_seed(2)
    side = torch.arange(4)
    positions = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(1, 16, 2)

    def looking() -> dict[str, torch.Tensor]:
        ids = torch.tensor([[20, 301, *[300] * 4, 302, 21, 22]])  # 16 patches, pooled two by two
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == 300).long(),
            "pixel_values": torch.rand(1, 16, 48, generator=generator),
            "image_position_ids": positions,
        }

    texts = [{"input_ids": torch.tensor([prompt])} for prompt in prompts(3, 30)]
    asked = [texts[0], looking(), looking(), texts[1]]
    expected = [
        model.generate(**inputs, max_new_tokens=20, do_sample=False, eos_token_id=None)[
            0, inputs["input_ids"].shape[1] :
        ]
        for inputs in asked
    ]
    got = run(model, tokenizer, [(inputs, settings(20, eos_token_id=None)) for inputs in asked])
    assert got == [answer.tolist() for answer in expected]
    assert got[1] != got[2]


def test_each_request_is_sampled_by_its_own_settings(model: Any, tokenizer: Any) -> None:
    [prompt] = prompts(9)

    def sampled(seed: int | None, temperature: float) -> GenerationConfig:
        config = settings(12, do_sample=True, temperature=temperature, eos_token_id=None)
        config.seed = seed
        return config

    greedy = settings(12, eos_token_id=None)
    asked = [sampled(1, 5.0), sampled(1, 5.0), sampled(2, 5.0), greedy, sampled(None, 5.0), sampled(None, 5.0)]
    got = together(model, tokenizer, [(prompt, config) for config in asked])
    assert got[0] == got[1]
    assert len({tuple(answer) for answer in got}) == 5
    assert got[3] == alone(model, prompt, 12)


def test_one_failing_request_takes_no_other_with_it(model: Any, tokenizer: Any) -> None:
    [prompt] = prompts(9)

    async def both() -> tuple[Any, Any]:
        batcher = Batcher(model, context=256)
        sound = {"input_ids": torch.tensor([prompt])}
        good = answer(batcher, tokenizer, sound, settings(5, eos_token_id=None))
        beyond = {"input_ids": torch.tensor([[VOCABULARY + 5]])}
        bad = answer(batcher, tokenizer, beyond, settings(5))
        try:
            return tuple(await asyncio.gather(good, bad, return_exceptions=True))  # type: ignore[return-value]
        finally:
            batcher.stop()

    good, bad = asyncio.run(both())
    assert good == alone(model, prompt, 5)
    assert isinstance(bad, HTTPException)
    assert bad.status_code == 503


def test_a_cancelled_request_ends_and_the_next_is_answered(model: Any, tokenizer: Any) -> None:
    [prompt] = prompts(4)
    inputs = {"input_ids": torch.tensor([prompt])}

    async def hang_up() -> tuple[int, list[int]]:
        batcher = Batcher(model, context=256)
        endless = settings(250, eos_token_id=None)
        stream = batcher.submit(inputs, endless, tokenizer._tokenizer)
        await anext(stream.items())
        stream.cancel()
        answered = await answer(batcher, tokenizer, inputs, settings(5, eos_token_id=None))
        batcher.stop()
        return len(stream.tokens), answered

    length, answered = asyncio.run(hang_up())
    assert length < 250
    assert answered == alone(model, prompt, 5)


def test_stopping_ends_every_request_with_an_error(model: Any, tokenizer: Any) -> None:
    inputs = {"input_ids": torch.tensor(prompts(4))}

    async def stop() -> list[Any]:
        batcher = Batcher(model, context=256)
        streams = [batcher.submit(inputs, settings(250, eos_token_id=None), tokenizer._tokenizer) for _ in range(3)]
        first = streams[0].items()
        await anext(first)
        batcher.stop()
        batcher.join(10)
        last = []
        for items in (first, streams[1].items(), streams[2].items()):
            with pytest.raises(HTTPException) as failed:
                [item async for item in items]
            last.append(failed.value.detail)
        with pytest.raises(HTTPException, match="shutting down"):
            batcher.submit(inputs, settings(5), tokenizer._tokenizer)
        return last

    assert asyncio.run(stop()) == ["the server is shutting down"] * 3


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_a_stop_string_ends_the_text_wherever_the_tokens_break(text: str, stop: list[str], data: st.DataObject) -> None:
    strings = StopStrings(stop)
    shown, left = "", text
    while left and not strings.found:
        piece = left[: data.draw(st.integers(1, 5))]
        left = left[len(piece) :]
        shown += strings.feed(piece)
        assert text.startswith(shown)
    if any(string in text for string in stop):
        assert strings.found
        assert any(text.startswith(shown + string) for string in stop)
        assert not any(string in shown for string in stop)
    else:
        assert not strings.found
        assert shown + strings.rest() == text
