"""Requests with wrong values in right places: answered or refused, never a failure of the server.

`W8A8_FUZZ` says how many damaged files other tests read; a twentieth of that are sent here.
"""

import json
import os
import random
from typing import Any

import httpx2 as httpx
import pytest

from tests.servers import Server
from w8a8.serve.embedded.protocol import ChatRequest, CompletionRequest, Message

pytestmark = pytest.mark.engine

REQUESTS = int(os.environ.get("W8A8_FUZZ", "2000")) // 20
PICTURE = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**64, 10**30, 0.5, 1e-45, 1e308, -0.0, float("nan"), "", "a", "\ud800", "\x00",
    "x" * 300, "http://127.0.0.1/", PICTURE, "none", "auto", "required", [], [None], [[]], ["x"] * 20, {}, {"a": 1},
    {"type": "text", "text": "x"}, [{"type": "text", "text": "x"}], [{"role": "user", "content": "a"}],
    {"type": "image_url", "image_url": {"url": PICTURE}}, {"include_usage": True}, {"type": "json_object"},
    {"name": "f", "arguments": "{"},
    [{"type": "function", "function": {"name": "f", "arguments": "[]"}}], {"enable_thinking": "x"}, {"suffix": 1e308},
    [{"type": "function", "function": {"name": "f", "parameters": None}}], {"suffix": "\ufffe"}, {"suffix": [1]},
]  # fmt: skip
FIELDS = [
    *dict.fromkeys([*ChatRequest.model_fields, *CompletionRequest.model_fields, *ChatRequest.unsupported, "store"])
]
PARTS = [*Message.model_fields, "refusal"]


def value(dice: random.Random, depth: int = 0) -> Any:
    if depth < 2 and dice.random() < 0.15:
        return [value(dice, depth + 1) for _ in range(dice.randint(0, 3))]
    if depth < 2 and dice.random() < 0.15:
        names = [*FIELDS, *PARTS, "type", "text", "url", "function"]
        return {dice.choice(names): value(dice, depth + 1) for _ in range(dice.randint(0, 3))}
    return dice.choice(VALUES)


def request(dice: random.Random) -> tuple[str, dict[str, Any]]:
    """A sound request, with some of its fields replaced."""
    body: dict[str, Any] = {"max_tokens": 2}
    chat = dice.random() < 0.7
    if chat:
        roles = ["system", "user", "assistant", "tool", "developer"]
        body["messages"] = [{"role": dice.choice(roles), "content": " w5"} for _ in range(dice.randint(1, 3))]
        for message in body["messages"]:
            if dice.random() < 0.5:
                message[dice.choice(PARTS)] = value(dice)
    else:
        body["prompt"] = " w1 w2"
    body |= {dice.choice(FIELDS): value(dice) for _ in range(dice.randint(0, 2))}
    return "/v1/chat/completions" if chat else "/v1/completions", body


def test_wrong_values_fail_nothing(server: Server) -> None:
    statuses = set()
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for seed in range(REQUESTS):
            path, body = request(random.Random(seed))
            content = json.dumps(body).encode()
            got = http.post(path, content=content, headers={"content-type": "application/json"})
            assert got.status_code in {200, 400, 404}, (seed, body, got.text)
            assert '"error"' not in got.text or got.status_code != 200, (seed, body, got.text)
            statuses.add(got.status_code)
    assert statuses >= {200, 400}
    assert "Traceback" not in server.said()
