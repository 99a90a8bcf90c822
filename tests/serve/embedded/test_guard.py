"""The guard in front of the app, with requests that come in pieces."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from w8a8.serve.embedded import guard
from w8a8.serve.embedded.guard import Guard

SCOPE = {"type": "http", "path": "/v1/completions", "headers": []}


class App:
    """An app that waits to be told to answer."""

    def __init__(self) -> None:
        self.answer = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await self.answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


async def ask(guarded: Guard, *pieces: bytes) -> int:
    """The status that a request with this body gets."""
    statuses: list[int] = []

    async def messages() -> AsyncIterator[Message]:
        for i, piece in enumerate(pieces):
            yield {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces)}
        await asyncio.Event().wait()

    coming = messages()

    async def receive() -> Message:
        return await anext(coming)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await guarded(dict(SCOPE), receive, send)
    [status] = statuses
    return status


def test_bodies_are_bounded_one_by_one_and_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 100)
    monkeypatch.setattr(guard, "MAX_HELD_BYTES", 150)

    async def three() -> None:
        app = App()
        guarded = Guard(app, None)
        assert await ask(guarded, bytes(60), bytes(60)) == 413
        first = asyncio.ensure_future(ask(guarded, bytes(50), bytes(50)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await ask(guarded, bytes(60)) == 503
        app.answer.set()
        assert await first == 200
        assert await ask(guarded, bytes(60)) == 200

    asyncio.run(three())


def test_a_body_of_many_values_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "MAX_VALUES", 10)
    assert asyncio.run(ask(Guard(App(), None), b"[" * 11)) == 413
