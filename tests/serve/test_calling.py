"""`w8a8 serve` says how to call the engine, and that works."""

import json
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.serve.launching import run, serving
from w8a8.serve.calling import Call, can_chat


def request(curl: str, **variables: str) -> Any:
    """Send what a curl line says, as a shell would read it."""
    words = shlex.split(curl.replace("\\\n", ""))
    headers = [words[i + 1] for i, word in enumerate(words) if word == "-H"]
    for name, value in variables.items():
        headers = [header.replace(f"${name}", value) for header in headers]
    data = words[words.index("-d") + 1].encode()
    pairs = dict(header.split(": ", 1) for header in headers)
    with urllib.request.urlopen(urllib.request.Request(words[1], data, pairs)) as answer:
        return json.load(answer)


def test_when_it_is_ready_it_says_how_to_call_it_and_that_works(model: Path, vllm: dict[str, str], port: int) -> None:
    with serving(model, "--port", str(port), env=vllm | {"W8A8_API_KEY": "s3cret"}) as server:
        said = server.wait_for("in Python")
        curl = said[said.index("curl ") : said.index("\n\nin Python")]
        answer = request(curl, W8A8_API_KEY="s3cret")
    assert "the engine speaks" in said
    assert "s3cret" not in said
    assert (answer["model"], answer["path"]) == (str(model), "/v1/chat/completions")
    assert answer["key"] == "Bearer s3cret"


def test_a_base_model_is_called_for_completions(model: Path, vllm: dict[str, str], port: int) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    with serving(model, "--port", str(port), env=vllm) as server:
        said = server.wait_for("in Python")
        assert request(said[said.index("curl ") : said.index("\n\nin Python")])["path"] == "/v1/completions"


def test_a_chat_template_passed_on_counts(model: Path, vllm: dict[str, str]) -> None:
    (model / "tokenizer_config.json").write_text("{}")
    assert "/v1/completions" in run(model, "--dry-run", env=vllm).stdout
    assert "/v1/chat/completions" in run(model, "--dry-run", "--", "--chat-template", "x", env=vllm).stdout


@pytest.mark.parametrize(
    ("files", "chat"),
    [
        ({}, True),  # headers alone: not known
        ({"tokenizer_config.json": "{}"}, False),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": ""}, True),
        ({"tokenizer_config.json": "{}", "chat_template.json": '{"chat_template": "x"}'}, True),
        ({"tokenizer_config.json": "[garbled"}, True),
    ],
)
def test_a_chat_template_is_found_wherever_it_stands(tmp_path: Path, files: dict[str, str], chat: bool) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert can_chat(str(tmp_path)) is chat


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://localhost:80/v1"), ("::1", "http://[::1]:80/v1"), ("0.0.0.0", "http://localhost:80/v1")],
)
def test_a_url_that_clients_can_use_is_made_of_what_is_listened_on(host: str, url: str) -> None:
    assert Call(host, 80, "m", chat=True).url == url
