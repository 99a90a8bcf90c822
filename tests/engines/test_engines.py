"""Stock vLLM and the embedded engine serve the same checkpoints, and say the same.

Not to the last bit: see test_arithmetic. Where the two choose different tokens, vLLM itself must have been near a tie.
`TIE` and `DRIFT` are what BF16 and INT8 rounding leave of agreement on these models: of the same checkpoint in FP32,
perturbing its embeddings by 1e-6 of their value moves log-probabilities by 0.09 on average and by 0.4 at most.

Where vLLM's sums saturate (see `tests/engines/int8.py`), both grow by what such sums do: our model is run with them
too, and the log-probabilities of the same tokens are compared with those that exact sums give. Engines that agreed
within `DRIFT` then differ by `DRIFT` and this at most; a gap between two tokens grows by twice the largest move.
"""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from openai import BadRequestError, NotFoundError
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import w8a8.runtime  # noqa: F401
from tests.engines.int8 import Int8Kernel
from tests.servers import Server, served

TIE = 1.0
"""The largest gap, in nats, between vLLM's two likeliest tokens where the engines may choose differently."""

DRIFT = 0.3
"""The largest mean difference, in nats, of the log-probabilities the engines give the same tokens."""

TOKENS = 24
VLLM = ("--", "--enforce-eager", "--max-num-seqs", "16")
CHECKPOINTS = ["gemma3-quark", "gemma3-compressed-tensors", "gemma4-quark"]
QUESTION = "What is it?"
PICTURES = [Image.linear_gradient("L").resize((96, 64)).convert("RGB"), Image.new("RGB", (96, 64), "blue")]
PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at", "2 + 2 ="]


@dataclass(frozen=True)
class Pair:
    """One checkpoint, served by both engines, and loaded here as the embedded engine loads it."""

    vllm: Server
    embedded: Server
    model: Any
    tokenizer: Any


@pytest.fixture(scope="module", params=CHECKPOINTS)
def pair(request: pytest.FixtureRequest, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    family, _, format_ = request.param.partition("-")
    made = request.getfixturevalue("gemma3_formats" if family == "gemma3" else "gemma4_w8a8")
    checkpoint: Path = made[format_] if family == "gemma3" else made
    model_class = AutoModelForCausalLM if family == "gemma3" else AutoModelForImageTextToText
    logs = tmp_path_factory.mktemp(request.param)
    environment = vllm_python.parent.parent
    with (
        served(checkpoint, "vllm", logs / "vllm", environment=environment, arguments=VLLM) as vllm,
        served(checkpoint, "transformers", logs / "transformers") as embedded,
    ):
        model = model_class.from_pretrained(checkpoint).eval()
        yield Pair(vllm, embedded, model, AutoTokenizer.from_pretrained(checkpoint))


@dataclass(frozen=True)
class Text:
    """vLLM's greedy continuation of a prompt."""

    prompt: str
    tokens: list[int]
    alternatives: list[dict[str, float]]
    """The log-probabilities of vLLM's two likeliest tokens at each place."""
    ours: torch.Tensor
    """The log-probabilities that our model gives `tokens`: float32 [len(tokens)]."""
    moved: torch.Tensor
    """By how much vLLM's INT8 sums, in our model, move those: zeros where they are exact."""


@pytest.fixture(scope="module")
def texts(pair: Pair, vllm_int8: Int8Kernel) -> list[Text]:
    found = []
    for prompt in PROMPTS:
        tokens, alternatives = greedy_with_alternatives(pair.vllm, prompt)
        ours = log_probabilities(pair, prompt, tokens)
        moved = torch.zeros_like(ours)
        if not vllm_int8.exact:
            with vllm_int8.in_our_layers():
                moved = (log_probabilities(pair, prompt, tokens) - ours).abs()
        found.append(Text(prompt, tokens, alternatives, ours, moved))
    return found


@pytest.fixture(params=["vllm", "embedded"])
def server(request: pytest.FixtureRequest, pair: Pair) -> Server:
    return getattr(pair, request.param)  # type: ignore[no-any-return]


def test_it_is_healthy_and_lists_the_model(server: Server) -> None:
    with urlopen(f"{server.url}/health") as answer:
        assert answer.status == 200
    (model,) = server.client.models.list().data
    assert model.id == server.model


def test_it_completes(server: Server) -> None:
    answer = complete(server, PROMPTS[0])
    assert answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == TOKENS


def test_it_streams_what_it_completes(server: Server) -> None:
    stream = server.client.completions.create(
        model=server.model, prompt=PROMPTS[0], max_tokens=TOKENS, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert sum(map(bool, pieces)) > 1
    assert "".join(pieces) == complete(server, PROMPTS[0]).choices[0].text


def test_it_answers_sixteen_at_once(server: Server) -> None:
    prompts = [f"{PROMPTS[i % 4]} {i}" for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: complete(server, prompt), prompts))
    assert all(answer.usage and answer.usage.completion_tokens == TOKENS for answer in answers)


def test_it_does_not_know_other_models(server: Server) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        server.client.completions.create(model="another", prompt="Hello", max_tokens=1)


def test_it_chats_or_says_that_there_is_no_template(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "In 1969 the"}]
    if "gemma4" not in server.model:
        with pytest.raises(BadRequestError, match="template"):
            server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=4)
        return
    answer = server.client.chat.completions.create(model=server.model, messages=messages, max_tokens=8, temperature=0)
    stream = server.client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=8, temperature=0, stream=True
    )
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed.strip() == (answer.choices[0].message.content or "").strip()


def test_it_sees_images_or_says_that_it_takes_none(server: Server) -> None:
    if "gemma4" not in server.model:
        with pytest.raises(BadRequestError):
            ask_about(server, PICTURES[0])
        return
    answers = [ask_about(server, picture).choices[0].message.content for picture in PICTURES]
    assert len(set(answers)) == len(PICTURES)


def test_greedy_tokens_agree_but_near_ties(pair: Pair, texts: list[Text]) -> None:
    for text in texts:
        chosen = complete(pair.embedded, text.prompt).choices[0].text
        if chosen != pair.tokenizer.decode(text.tokens, skip_special_tokens=True):
            first = first_difference(chosen, pair.tokenizer, text.tokens)
            likeliest, second, *_ = sorted(text.alternatives[first].values(), reverse=True)
            tie = TIE + 2 * text.moved.max()
            assert likeliest - second < tie, f"{text.prompt!r}: token {first} differs, and was no near tie for vLLM"


def test_log_probabilities_agree_on_the_same_tokens(texts: list[Text]) -> None:
    differences = []
    for text in texts:
        theirs = torch.tensor([max(values.values()) for values in text.alternatives])
        differences.append((text.ours - theirs).abs())
    assert torch.cat(differences).mean() < DRIFT + torch.cat([text.moved for text in texts]).mean()


def test_images_are_seen_alike(pair: Pair) -> None:
    """The token vLLM answers a picture with is, but for near ties, the one our model gives it."""
    if "gemma4" not in pair.vllm.model:
        return
    processor = AutoProcessor.from_pretrained(pair.vllm.model)
    for picture in PICTURES:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        )  # fmt: skip
        with torch.inference_mode():
            ours = pair.model(**inputs).logits[0, -1].float().log_softmax(-1)
        answer = ask_about(pair.vllm, picture, logprobs=True, extra_body={"return_tokens_as_token_ids": True})
        theirs = answer.choices[0].logprobs.content[0]
        token = int(theirs.token.removeprefix("token_id:"))
        assert ours.max() - ours[token] < TIE
        assert abs(ours[token] - theirs.logprob) < TIE


def complete(server: Server, prompt: str) -> Any:
    return server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )


def greedy_with_alternatives(vllm: Server, prompt: str) -> tuple[list[int], list[dict[str, float]]]:
    """vLLM's greedy tokens, and the log-probabilities of the two likeliest at each."""
    answer = vllm.client.completions.create(
        model=vllm.model, prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=2,
        extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    return [int(token.removeprefix("token_id:")) for token in logprobs.tokens], logprobs.top_logprobs


def log_probabilities(pair: Pair, prompt: str, tokens: list[int]) -> torch.Tensor:
    """What our model gives each of `tokens`, the ones before it given: float32 [len(tokens)]."""
    start = pair.tokenizer(prompt, return_tensors="pt").input_ids
    ids = torch.cat([start, torch.tensor([tokens])], dim=1)
    with torch.inference_mode():
        logits = pair.model(ids).logits[0, start.shape[1] - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def first_difference(text: str, tokenizer: Any, tokens: list[int]) -> int:
    """The first of `tokens` that `text` does not go on with."""
    begins = (tokenizer.decode(tokens[: i + 1], skip_special_tokens=True).rstrip("\ufffd") for i in range(len(tokens)))
    return next(i for i, begin in enumerate(begins) if not text.startswith(begin))


def ask_about(server: Server, picture: Image.Image, **options: Any) -> Any:
    """The answer to a question about a picture."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0, **options
    )
