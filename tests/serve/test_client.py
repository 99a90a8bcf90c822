"""What is an address, and which servers are reached by the environment's proxy."""

from http.server import BaseHTTPRequestHandler

import pytest

from tests.evals.api import KEY, MODEL, running_api
from tests.servers import listening
from w8a8.evals.asking import Reply, Server, ask_all, find_model
from w8a8.serve.client import address, connect

VARIABLES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("HTTPS://example.org/v1", "HTTPS://example.org/v1"),
        ("localhost:8000/v1", "http://localhost:8000/v1"),
        ("localhost:8000", "http://localhost:8000"),
        ("127.0.0.1:8000/", "http://127.0.0.1:8000/"),
        ("[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("my-host.example:80/v1", "http://my-host.example:80/v1"),
        ("org/name", None),
        ("org/name@main", None),
        ("./folder", None),
        ("/a/b:1", None),
        ("name", None),
        ("name:tag", None),
        ("ftp://localhost:21", None),
    ],
)
def test_what_names_a_server(text: str, url: str | None) -> None:
    assert address(text) == url


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_reached_without_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    replies: dict[int, Reply] = {}
    request = {"model": MODEL, "messages": [{"role": "user", "content": "Box 2"}]}
    with running_api() as api:
        server = Server(api.url.replace("127.0.0.1", host), KEY)
        assert find_model(server, None).name == MODEL
        ask_all(server, {0: request}, concurrency=1, answered=lambda i, reply, _: replies.update({i: reply}))
    assert replies[0].error is None


def test_other_machines_are_reached_by_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"object": "list", "data": []}')

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with listening(Proxy) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("http_proxy", proxy)
        connect("http://model.example/v1", KEY, max_retries=0).models.list()
    assert asked == ["http://model.example/v1/models"]
