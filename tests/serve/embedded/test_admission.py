"""Requests begin when there is memory for them, wait within bounds, and are told when they cannot have their turn."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import HTTPException

from tests.serve.embedded.servers import prompt, serving
from tests.serve.embedded.test_batching import alone, llama, prompts, settings
from tests.serve.embedded.test_batching import tokenizer as tokenizer
from w8a8.serve.embedded import batching
from w8a8.serve.embedded.batching import Batcher
from w8a8.serve.embedded.caches import Caches

pytestmark = pytest.mark.slow


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return llama().eval()


def test_no_more_run_than_there_is_memory_for(model: Any, tokenizer: Any) -> None:
    asked = list(zip(prompts(3, 50, 7, 9, 11, 5), (47, 50, 13, 11, 9, 95), strict=True))
    sizes: list[int] = []

    async def every() -> list[list[int]]:
        batcher = Batcher(model, context=256, room=Caches(model).nbytes(100))
        hook = model.register_forward_pre_hook(
            lambda _, __, given: sizes.append(len(given["past_key_values"].layers[0].counts)), with_kwargs=True
        )
        streams = [
            batcher.submit({"input_ids": torch.tensor([p])}, settings(n, eos_token_id=None), tokenizer._tokenizer)
            for p, n in asked
        ]
        for stream in streams:
            await stream.turn()
            assert [item async for item in stream.items()]
        batcher.stop()
        hook.remove()
        return [stream.tokens for stream in streams]

    got = asyncio.run(every())
    assert max(sizes) == 3  # 20 tokens each; the others need half of the room, all of it, all of it
    assert got == [alone(model, p, n, eos_token_id=None) for p, n in asked]


def test_a_request_that_can_never_fit_is_refused_at_once(model: Any, tokenizer: Any) -> None:
    async def ask() -> tuple[int, Any]:
        batcher = Batcher(model, context=256, room=Caches(model).nbytes(100))
        with pytest.raises(HTTPException, match="context is 100 tokens") as refused:
            batcher.submit({"input_ids": torch.tensor(prompts(90))}, settings(11), tokenizer._tokenizer)
        fitting = batcher.submit({"input_ids": torch.tensor(prompts(90))}, settings(10), tokenizer._tokenizer)
        assert [item async for item in fitting.items()]
        batcher.stop()
        return batcher.context, refused.value.status_code

    assert asyncio.run(ask()) == (100, 400)


def test_who_hangs_up_while_waiting_makes_room_in_the_queue(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_RUNNING", 1)
    monkeypatch.setattr(batching, "MAX_WAITING", 2)

    async def ask() -> list[int]:
        batcher = Batcher(model, context=256)

        def submit(tokens: int) -> Any:
            ids = {"input_ids": torch.tensor(prompts(4))}
            return batcher.submit(ids, settings(tokens, eos_token_id=None), tokenizer._tokenizer)

        first = submit(250)
        await first.turn()
        waiting = [submit(5), submit(5)]
        with pytest.raises(HTTPException, match="waiting already") as refused:
            submit(5)
        assert refused.value.status_code == 503
        assert refused.value.headers == {"Retry-After": "10"}
        waiting[0].cancel()
        last = submit(5)
        first.cancel()
        assert [item async for item in last.items()]
        batcher.stop()
        return [len(stream.tokens) for stream in (*waiting, last)]

    assert asyncio.run(ask()) == [0, 5, 5]


def test_a_server_says_what_fits_and_refuses_clearly(checkpoint: Path) -> None:
    limits = {"batching.MAX_RUNNING": 1, "batching.MAX_WAITING": 1, "stream.MAX_WAIT_SECONDS": 1}
    with serving(checkpoint, "busy", limits=limits) as server, ThreadPoolExecutor(3) as pool:
        cache = httpx.get(f"{server.url}/health").json()["cache"]
        assert cache["dtype"] == "float32"
        assert cache["tokens"] >= 8192
        assert cache["bytes"] > 2**20
        assert "keys and values in float32" in server.said()

        def ask(streamed: bool) -> httpx.Response:
            body = {"prompt": prompt(2), "max_tokens": 8000, "temperature": 0, "stream": streamed}
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={"prompt": prompt(2), "max_tokens": 8000, "stream": True}
        ) as running:
            lines = running.iter_lines()  # kept: its end would be the connection's
            assert next(lines).startswith("data: ")
            answers = list(pool.map(ask, (True, False)))
    assert [answer.status_code for answer in answers] == [503, 503]
    assert [answer.headers["Retry-After"] for answer in answers] == ["10", "10"]
    assert {answer.json()["error"]["code"] for answer in answers} == {503}
    assert {"waiting already" in answer.text for answer in answers} == {True, False}
