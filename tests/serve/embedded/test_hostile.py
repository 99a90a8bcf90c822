"""A hostile client, over raw sockets and in JSON: each request gets its 4xx, and the server goes on."""

import base64
import json
import os
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from tests.serve.embedded.servers import ENDLESS, KEY, NAME, message, serving
from tests.servers import Server

pytestmark = pytest.mark.engine

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def post(server: Server, path: str, body: Any, seconds: float = 60) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {server.key}"}
    return httpx.post(server.url + path, content=content, headers=headers, timeout=seconds)


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": message("a"), **fields}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "a", **fields}


def template(**values: Any) -> tuple[str, dict[str, Any]]:
    return chat(chat_template_kwargs=values)


def png(width: int, height: int) -> str:
    """A PNG whose header claims this size, and whose pixels are not there."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(b''.join((SIGNATURE, *packed))).decode()}"


def image(url: str) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": message([{"type": "image_url", "image_url": {"url": url}}])}


def deep(levels: int) -> bytes:
    return b'{"prompt": "a", "x": ' + b"[" * levels + b"]" * levels + b"}"


REFUSED: dict[str, tuple[str, Any, str]] = {
    "a template": (*template(chat_template="2+2="), "no chat_template"),
    "a length": (*template(padding="max_length", max_length=10**9), "no max_length, padding"),
    "the processor's arguments": (*template(processor_kwargs={"images": "http://a"}), "chat_template_kwargs"),
    "an object by a name that is read": (*template(enable_thinking={"a": 1}), "chat_template_kwargs"),
    "a list by a name that is read": (*template(suffix=["a"]), "chat_template_kwargs"),
    "a long text by a name that is read": (*template(suffix="a" * 20_000), "chat_template_kwargs"),
    "a huge number by a name that is read": (*template(suffix=10**400), "chat_template_kwargs"),
    "the messages, by name": (*template(messages=1), "no messages"),
    "the tools, by name": (*template(tools=1), "no tools"),
    "a function of the template's": (*template(range=1), "no range"),
    "tokenize": (*template(tokenize=False), "no tokenize"),
    "a template beside": (*chat(chat_template="x"), "chat_template"),
    "processor_kwargs": (*chat(processor_kwargs={"images": "http://127.0.0.1/"}), "processor_kwargs"),
    "images": (*chat(images=["/etc/passwd"]), "images"),
    "documents": (*chat(documents=[{"text": "a"}]), "documents"),
    "a continued message": (*chat(continue_final_message=True), "continue_final_message"),
    "a forced call": (*chat(tool_choice="required"), "tool_choice"),
    "a tool without a name": (*chat(tools=[{"type": "function"}]), "tools"),
    "an old call": (CHAT, {"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "function_call"),
    "audio out": (*chat(modalities=["text", "audio"]), "modalities"),
    "structured output": (*chat(structured_outputs={"regex": "a"}), "structured_outputs"),
    "a penalty": (*complete(presence_penalty=1), "presence_penalty"),
    "a least length": (*complete(min_tokens=5), "min_tokens"),
    "no content": (*chat(messages=message(None)), "messages.0"),
    "no content of a tool": (*chat(messages=[{"role": "tool", "tool_call_id": "1"}]), "messages.0"),
    "a role that there is not": (*chat(messages=[{"role": "root", "content": "a"}]), "messages.0.role"),
    "a tiny temperature": (*complete(temperature=1e-45), "temperature"),
    "a huge temperature": (*complete(temperature=1e308), "temperature"),
    "a temperature of 400 digits": (*complete(temperature=10**400), "temperature"),
    "a probability of 400 digits": (*complete(top_p=10**400), "top_p"),
    "an endless temperature": (*complete(temperature=float("inf")), "JSON"),
    "a temperature that overflows": (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}', "JSON"),
    "a tiny penalty": (*complete(repetition_penalty=1e-300), "repetition_penalty"),
    "a huge penalty": (*complete(repetition_penalty=1e300), "repetition_penalty"),
    "huge max_tokens": (*complete(max_tokens=10**400), "max_tokens"),
    "a huge seed": (*complete(seed=-(10**400)), "seed"),
    "a huge top_k": (*complete(top_k=10**400), "top_k"),
    "a number with too many digits": (COMPLETIONS, b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    "half a pair": (COMPLETIONS, b'{"prompt": "\\ud800"}', "surrogate"),
    "half a pair in a name": (COMPLETIONS, b'{"prompt": "a", "\\udc00": 1}', "surrogate"),
    "half a pair in a stop string": (COMPLETIONS, b'{"prompt": "a", "stop": ["\\ud800"]}', "surrogate"),
    "half a pair in a call": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": '{"place": "\\ud800"}'}}]}]},
        "surrogate",
    ),
    "nested lists": (COMPLETIONS, deep(100_000), "JSON"),
    "nested arguments": (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99_999}}]}]},
        "messages.0.tool_calls",
    ),
    "a prompt of spaces": (*complete(prompt=" " * 30_000_000), "characters"),
    "messages of spaces": (*chat(messages=message(" " * 30_000_000)), "characters"),
    "a large picture": (*image(png(7000, 7000)), "7000 x 7000 pixels"),
    "a long picture": (*image(png(1, 40_000_000)), "1 x 40000000 pixels"),
    "a narrow picture": (*image(png(1, 16_000)), "1 x 16000 pixels"),
    "a picture without pixels": (*image("data:image/png;base64,"), "not a readable image"),
    "a template that needs all memory": (*chat(messages=message("memory")), "chat template refuses"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_overflow_reach_out_or_take_over_is_a_400(server: Server, what: str) -> None:
    path, body, reason = REFUSED[what]
    got = post(server, path, body)
    assert got.status_code == 400, got.text
    assert reason in got.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_what_any_page_in_a_browser_may_send_is_a_400(server: Server, kind: str) -> None:
    got = httpx.post(server.url + COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": kind})
    assert (got.status_code, "application/json" in got.text) == (400, True)


def test_too_many_values_are_refused_before_they_are_read(server: Server) -> None:
    assert post(server, COMPLETIONS, b'{"prompt": [' + b"{}," * 2_000_000 + b"{}]}").status_code == 413


@pytest.mark.parametrize("content", ["loop", "power"])
def test_a_template_that_does_not_end_stops_nobody_else(server: Server, client: openai.OpenAI, content: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(post, server, CHAT, {"messages": message(content)})
        time.sleep(0.5)
        assert httpx.get(f"{server.url}/health", timeout=4).status_code == 200
        client.models.list()
        got = endless.result()
    assert (got.status_code, "did not end" in got.text) == (400, True)
    assert client.chat.completions.create(model=NAME, messages=message(" w8"), max_tokens=2).choices[0].message.content


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_tokenizer_that_does_not_end_stops_nobody_else(server: Server, client: openai.OpenAI, path: str) -> None:
    body = {"messages": message(ENDLESS)} if path == CHAT else {"prompt": ENDLESS}
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(post, server, path, body)
        time.sleep(0.5)
        assert httpx.get(f"{server.url}/health", timeout=4).status_code == 200
        got = endless.result()
    assert (got.status_code, "tokenizer cannot read the prompt: it did not end" in got.text) == (400, True)
    assert client.chat.completions.create(model=NAME, messages=message(" w8"), max_tokens=2).choices[0].message.content


def test_a_template_that_does_not_end_keeps_no_signal_out(checkpoint: Path) -> None:
    with serving(checkpoint, "ending") as server, ThreadPoolExecutor(1) as pool:
        endless = pool.submit(post, server, CHAT, {"messages": message("loop")})
        time.sleep(1)
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        assert children
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == -signal.SIGTERM
        assert endless.exception() is not None or endless.result().status_code == 503
    assert not any(_runs(int(pid)) for pid in children)


def _runs(pid: int) -> bool:
    try:
        return b"rendering" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def connected(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=30)


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer " + KEY.encode() + b"\r\n"


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", HEAD], ids=["nothing", "a part of a line", "half a head"])
def test_a_client_that_does_not_ask_is_cut_off(locked: Server, begun: bytes) -> None:
    with connected(locked) as client:
        client.sendall(begun)
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""


def test_a_client_that_asks_slowly_is_cut_off(locked: Server) -> None:
    begun = time.monotonic()
    with connected(locked) as client, suppress(ConnectionError):
        while time.monotonic() < begun + 30:
            client.sendall(b"G")
            time.sleep(0.2)
    assert time.monotonic() < begun + 20


def test_a_body_that_does_not_come_is_a_408(locked: Server) -> None:
    with connected(locked) as client:
        client.sendall(HEAD + b'content-length: 1000\r\n\r\n{"prompt": ')
        assert client.recv(100).startswith(b"HTTP/1.1 408 ")


def test_connections_that_say_nothing_make_room_for_those_that_do(locked: Server) -> None:
    silent = [connected(locked) for _ in range(60)]
    try:
        assert locked.client.models.list().data
        assert locked.healthy()
    finally:
        for client in silent:
            client.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        os.urandom(4096),
    ],
)
def test_what_is_not_http_is_a_400_or_the_end(server: Server, sent: bytes) -> None:
    with connected(server) as client:
        client.sendall(sent + b"\r\n\r\n")
        try:
            answer = client.recv(100)
        except ConnectionResetError:
            answer = b""
    assert answer == b"" or answer.split()[1].startswith(b"4"), answer
    assert server.healthy()
