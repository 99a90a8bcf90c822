"""The embedded engine over HTTP: the openai client, and whatever else a socket may send."""

import base64
import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from fastapi import HTTPException
from PIL import Image

from tests.serve.embedded.servers import KEY, NAME, message, prompt, serving
from tests.servers import Server
from w8a8.checkpoint import Checkpoint
from w8a8.errors import EngineError, PortInUseError
from w8a8.serve.embedded import guard
from w8a8.serve.embedded.images import check
from w8a8.serve.embedded.protocol import ChatRequest

pytestmark = pytest.mark.engine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def image_url(kind: str = "PNG") -> str:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image_message(url: str) -> list[Any]:
    return message([{"type": "text", "text": "w1"}, {"type": "image_url", "image_url": {"url": url}}])


def test_it_lists_exactly_the_model_by_the_name_it_was_given(client: openai.OpenAI, server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200
    [model] = client.models.list().data
    assert model.id == NAME
    assert model.max_model_len == 8192  # type: ignore[attr-defined]


def test_a_completion_counts_its_tokens_and_says_why_it_ended(client: openai.OpenAI) -> None:
    made = client.completions.create(model=NAME, prompt=prompt(2), max_tokens=5, temperature=0)
    [choice] = made.choices
    assert (made.model, choice.finish_reason, len(choice.text.split())) == (NAME, "length", 5)
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (7, 5, 12)
    by_default = client.completions.create(model=NAME, prompt=prompt(2))
    assert by_default.usage is not None
    assert by_default.usage.completion_tokens == 16


def test_a_stream_says_the_same_and_ends_as_the_api_ends_one(client: openai.OpenAI, server: Server) -> None:
    whole = client.completions.create(model=NAME, prompt=prompt(2), max_tokens=20, temperature=0)
    asked: dict[str, Any] = {"model": NAME, "prompt": prompt(2), "max_tokens": 20, "temperature": 0, "stream": True}
    chunks = list(client.completions.create(**asked))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)
    *others, last = client.completions.create(**asked, stream_options={"include_usage": True})
    assert (last.choices, last.usage) == ([], whole.usage)
    assert [chunk.choices[0].text for chunk in others] == [chunk.choices[0].text for chunk in chunks]
    assert all(chunk.usage is None for chunk in others)
    body = {"prompt": prompt(2), "max_tokens": 2, "stream": True}
    assert httpx.post(server.url + COMPLETIONS, json=body).text.endswith("data: [DONE]\n\n")


def test_chat_answers_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": message(" w8 w7"), "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 12)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_a_stop_string_is_not_part_of_the_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": prompt(1), "max_tokens": 20, "temperature": 0}
    words = client.completions.create(**asked).choices[0].text
    stop = words.split()[4]
    expected = words[: words.index(stop)]
    made = client.completions.create(**asked, stop=stop)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(**asked, stop=[stop], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_sampling_follows_the_temperature_and_the_seed(client: openai.OpenAI) -> None:
    def say(**how: Any) -> str:
        made: openai.types.Completion = client.completions.create(model=NAME, prompt=prompt(1), max_tokens=12, **how)
        return made.choices[0].text

    assert say(seed=1) == say(seed=1)
    assert say(temperature=5, seed=1) != say(temperature=5, seed=2)
    assert say(temperature=5) != say(temperature=5)
    greedy = say(temperature=0)
    assert say(temperature=0) == greedy
    assert say(temperature=5, extra_body={"top_k": 1}) == greedy


def test_sixteen_at_once_get_what_they_get_one_by_one(client: openai.OpenAI) -> None:
    def say(i: int) -> str:
        return client.completions.create(model=NAME, prompt=prompt(i), max_tokens=40, temperature=0).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(say, range(16)))
    assert together == [say(i) for i in range(16)]


def test_sixteen_at_once_are_answered_together(client: openai.OpenAI) -> None:
    """Nobody's last word comes before everybody's first."""

    def say(i: int) -> tuple[float, float]:
        stream = client.completions.create(model=NAME, prompt=prompt(i), max_tokens=300, temperature=0, stream=True)
        times = [time.monotonic() for _ in stream]
        return times[0], times[-1]

    with ThreadPoolExecutor(16) as pool:
        first, last = zip(*pool.map(say, range(16)), strict=True)
    assert max(first) < min(last)


BAD: dict[str, tuple[str, Any, str]] = {
    "no JSON": (COMPLETIONS, b'{"prompt": ', "JSON"),
    "not UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}', ""),
    "no object": (COMPLETIONS, [1], "object"),
    "no prompt": (COMPLETIONS, {}, "prompt"),
    "prompt of a wrong type": (COMPLETIONS, {"prompt": 5}, "prompt"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "empty"),
    "temperature of a wrong type": (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    "negative temperature": (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    "NaN": (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}', ""),
    "no tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "tokens of a wrong type": (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    "more tokens than the context": (COMPLETIONS, {"prompt": "a", "max_tokens": 9000}, "8192"),
    "a prompt beyond the context": (COMPLETIONS, {"prompt": " w1" * 8192}, "8192"),
    "a seed too large": (COMPLETIONS, {"prompt": "a", "seed": 2**64}, "seed"),
    "an empty stop string": (COMPLETIONS, {"prompt": "a", "stop": ["b", ""]}, "stop"),
    "more logprobs than there are": (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    "logprobs in a stream": (COMPLETIONS, {"prompt": "a", "logprobs": 1, "stream": True}, "logprobs"),
    "echo in a stream": (COMPLETIONS, {"prompt": "a", "echo": True, "stream": True}, "echo"),
    "echo in a chat": (CHAT, {"messages": message("a"), "echo": True}, "echo"),
    "logprobs of a chat by number": (CHAT, {"messages": message("a"), "logprobs": 1}, "logprobs"),
    "top_logprobs alone": (CHAT, {"messages": message("a"), "top_logprobs": 2}, "top_logprobs: needs logprobs"),
    "top_logprobs without logprobs": (CHAT, {"messages": message("a"), "logprobs": False, "top_logprobs": 1}, "needs"),
    "more top_logprobs than there are": (
        CHAT, {"messages": message("a"), "logprobs": True, "top_logprobs": 21}, "top_logprobs",
    ),
    "fewer top_logprobs than none": (
        CHAT, {"messages": message("a"), "logprobs": True, "top_logprobs": -1}, "top_logprobs",
    ),
    "a token that is none": (COMPLETIONS, {"prompt": [1, 320]}, "320"),
    "a negative token": (COMPLETIONS, {"prompt": [1, -1]}, "prompt"),
    "no tokens at all": (COMPLETIONS, {"prompt": []}, "empty"),
    "two prompts": (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
    "two answers": (COMPLETIONS, {"prompt": "a", "n": 2}, "n:"),
    "a generation config": (COMPLETIONS, {"prompt": "a", "generation_config": "{}"}, "generation_config"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "messages of a wrong type": (CHAT, {"messages": ["hello"]}, "messages"),
    "an unknown kind of content": (CHAT, {"messages": message([{"type": "video_url", "url": "x"}])}, "content"),
    "a role the template refuses": (CHAT, {"messages": message("clown")}, "no clowns"),
    "a role that there is not": (CHAT, {"messages": [{"role": "clown", "content": "a"}]}, "messages.0.role"),
    "JSON mode": (CHAT, {"messages": message("a"), "response_format": {"type": "json_object"}}, "response_format"),
    "an image for a text model": (CHAT, {"messages": image_message(image_url())}, "no images"),
    "an image of this machine": (CHAT, {"messages": image_message("file:///etc/hostname")}, "fetches nothing"),
    "an image by path": (CHAT, {"messages": image_message("/etc/hostname")}, "fetches nothing"),
    "an image elsewhere": (CHAT, {"messages": image_message("http://127.0.0.1/a.png")}, "fetches nothing"),
    "no image at all": (CHAT, {"messages": image_message("data:image/png;base64,AAAA")}, "not a readable image"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_answered_is_a_400_that_says_why(server: Server, what: str) -> None:
    path, body, reason = BAD[what]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    got = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert got.status_code == 400, got.text
    error = got.json()["error"]
    assert reason in error["message"]
    assert (error["type"], error["code"]) == ("BadRequestError", 400)


def test_another_model_is_a_404(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"other does not exist.*some/model@main:8"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.NotFoundError, match="other does not exist"):
        client.chat.completions.create(model="other", messages=message("a"))


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/responses", "/v1/audio/transcriptions", "/nothing"])
def test_what_loads_unloads_or_fetches_is_not_there(server: Server, path: str) -> None:
    got = httpx.post(server.url + path, json={"model": "other"})
    assert got.status_code == 404
    assert got.json()["error"]["code"] == 404


def test_a_body_too_large_is_a_413(server: Server, client: openai.OpenAI) -> None:
    with httpx.Client() as http:
        got = http.post(server.url + COMPLETIONS, content=b"x" * (guard.MAX_BODY_BYTES + 1))
    assert got.status_code == 413
    assert client.models.list().data


def test_a_model_without_a_template_says_so_and_completes(locked: Server) -> None:
    client = locked.client
    with pytest.raises(openai.BadRequestError, match="plain has no chat template: use /v1/completions"):
        client.chat.completions.create(model="plain", messages=message("a"))
    assert client.completions.create(model="plain", prompt=prompt(1)).choices[0].text


def test_the_context_is_what_was_asked_for(locked: Server) -> None:
    client = locked.client
    client.completions.create(model="plain", prompt=" w1" * 60, max_tokens=4)
    with pytest.raises(openai.BadRequestError, match="context is 64 tokens"):
        client.completions.create(model="plain", prompt=" w1" * 60, max_tokens=5)


@pytest.mark.parametrize("header", [None, "", KEY, "Bearer", f"Bearer {KEY}x", f"Basic {KEY}", "Bearer käse"])
def test_without_the_key_there_is_only_health(locked: Server, header: str | None) -> None:
    headers = [] if header is None else [(b"authorization", header.encode())]
    for method, path in (("GET", "/v1/models"), ("POST", COMPLETIONS), ("POST", CHAT), ("GET", "/docs")):
        got = httpx.request(method, locked.url + path, headers=headers)
        assert (got.status_code, got.json()["error"]["code"]) == (401, 401)
    assert httpx.get(f"{locked.url}/health", headers=headers).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_leave_room_for_the_next(server: Server, client: openai.OpenAI, *, stream: bool) -> None:
    """Sixteen answers of a minute take all places, streamed or waited for."""
    body = json.dumps({"prompt": prompt(1), "max_tokens": 8000, "stream": stream}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(16)]
    for connection in connections:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    if stream:
        assert all(connection.recv(1) for connection in connections)
    else:
        time.sleep(1)  # nothing tells that they have begun
    for connection in connections:
        connection.close()
    answer = client.with_options(timeout=15).completions.create(model=NAME, prompt=prompt(3), max_tokens=4)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_in_the_middle_of_an_answer(checkpoint: Path, number: signal.Signals) -> None:
    with serving(checkpoint, NAME) as server, server.client as client:
        stream = client.completions.create(model=NAME, prompt=prompt(1), max_tokens=8000, stream=True)
        next(stream)
        server.process.send_signal(number)
        server.process.wait(60)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_an_image_in_the_request_is_accepted(kind: str) -> None:
    assert ChatRequest.parse({"messages": image_message(image_url(kind))}).images


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    file = BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    with pytest.raises(HTTPException, match="10000 x 10000 pixels"):
        ChatRequest.parse({"messages": image_message(url)})


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [([(8, 8)] * 33, "33 images are too many"), ([(4096, 4096)] * 3, "50,331,648 pixels together")],
)
def test_images_that_are_too_large_together_are_not_decoded(pictures: list[tuple[int, int]], reason: str) -> None:
    file = BytesIO()
    Image.new("1", pictures[0]).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    with pytest.raises(ValueError, match=reason):
        check([url] * len(pictures))


def test_what_cannot_be_loaded_is_an_engine_error(tmp_path: Path, checkpoint: Path) -> None:
    from w8a8.serve.embedded.server import run

    headers = Checkpoint.open(checkpoint)
    settings: dict[str, Any] = {"headers": headers, "host": "127.0.0.1", "port": 0, "api_key": None, "ready": print}
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if not file.name.endswith(".safetensors"):
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(EngineError, match="broken: transformers cannot load it"):
        run("broken", broken, **settings)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["NoSuchModel"]}))
    with pytest.raises(EngineError, match="no architecture NoSuchModel"):
        run("broken", broken, **settings)


def test_a_port_that_is_taken_is_known_before_anything_is_loaded(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    from w8a8.serve.embedded.server import run

    headers = Checkpoint.open(checkpoint)
    with pytest.raises(PortInUseError, match=f"127.0.0.1:{server.port}"):
        run("none", tmp_path, headers=headers, host="127.0.0.1", port=server.port, api_key=None, ready=print)


def test_without_the_extra_the_error_names_it() -> None:
    program = "import sys; sys.modules['uvicorn'] = None; import w8a8.serve.embedded.server"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert "pip install 'w8a8[serve]'" in done.stderr
