"""Hubs that answer what no Hub would, over real HTTP: each is refused in one line, soon, and nothing grows."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha1
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import zstandard
from huggingface_hub import constants

from tests.checkpoint.hub import COMMIT
from tests.checkpoints import folder_bytes, llama_tensors, write_checkpoint
from tests.servers import listening
from w8a8.checkpoint import remote, session
from w8a8.checkpoint.hub import HubFolder
from w8a8.checkpoint.remote import SCRATCH
from w8a8.errors import W8A8Error
from w8a8.storage import download
from w8a8.storage.arrivals import Repository

Answer = tuple[int, Mapping[str, str], bytes | Iterator[bytes]]
"""Status, headers, body; of a body that is an iterator, the client is not told where it ends."""

MB = b" " * 10**6


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    return folder_bytes(write_checkpoint(tmp_path_factory.mktemp("hub") / "llama", llama_tensors(), shards=2))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (remote, download):
        monkeypatch.setattr(module, "BACKOFF_SECONDS", 0.0)


@contextmanager
def asked(answer: Callable[[str], Answer], patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Be asked by this process; yields the bytes that were sent."""
    sent: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            status, headers, body = answer(self.path)
            self.send_response(status)
            pieces = [body] if isinstance(body, bytes) else body
            length = {"Content-Length": str(len(body))} if isinstance(body, bytes) else {"Connection": "close"}
            for name, value in {**length, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):
                sent.extend(self.wfile.write(piece) for piece in pieces)
            self.close_connection = not isinstance(body, bytes)

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

    with listening(Handler) as url:
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield sent


def described(files: Mapping[str, bytes], **other: Any) -> dict[str, Any]:
    """What the Hub says of a model with these files."""
    siblings = [
        {"rfilename": name, "size": len(data), "blobId": sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        for name, data in files.items()
    ]
    return {"id": "org/llama", "sha": COMMIT, "siblings": siblings, **other}


def hub_of(
    files: Mapping[str, bytes], said: Any, file: Callable[[str], Answer] | None = None
) -> Callable[[str], Answer]:
    """A Hub that says `said` of its model, and gives its files, or what `file` gives."""

    def answer(path: str) -> Answer:
        if path.startswith("/api/"):
            return 200, {"Content-Type": "application/json"}, json.dumps(said).encode()
        name = path.partition(f"{COMMIT}/")[2]
        return file(name) if file else (200, {}, files[name])

    return answer


def refused(answer: Callable[[str], Answer], patch: pytest.MonkeyPatch) -> tuple[str, int]:
    """The one line with which a model is refused, and the bytes that were sent for it."""
    with asked(answer, patch) as sent, pytest.raises(W8A8Error) as error:
        Repository.open(HubFolder.find("org/llama", None))
    assert "\n" not in str(error.value)
    return str(error.value), sum(sent)


def test_a_plain_hub_is_opened(llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with asked(hub_of(llama, described(llama)), monkeypatch):
        assert len(Repository.open(HubFolder.find("org/llama", None)).checkpoint.shards) == 2


@pytest.mark.parametrize("commit", ["/tmp/elsewhere", "../../elsewhere", "..", "", None, 7, "main", "a" * 41, "A" * 40])
def test_a_commit_is_no_path(llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, commit: Any) -> None:
    assert "which commit" in refused(hub_of(llama, described(llama, sha=commit)), monkeypatch)[0]


@pytest.mark.parametrize(
    "said",
    [[], None, "x", 7, {}, {"siblings": 7}, {"siblings": [7]}, {"siblings": [{}]}, {"siblings": {"a": "b"}},
     {"id": "org/llama", "sha": COMMIT, "siblings": [{"rfilename": 7}]},
     {"id": "org/llama", "sha": COMMIT, "siblings": [{"rfilename": ["a"]}]},
     *({"id": "org/llama", "sha": COMMIT, "siblings": [{"rfilename": "a.safetensors", **more}]}
       for more in ({}, {"size": -1}, {"size": 2**60}, {"size": "9"}, {"size": None}, {"size": 1.5},
                    {"size": 1, "lfs": {}}, {"size": 1, "lfs": []}, {"size": 1, "lfs": {"sha256": 1}}))],
)  # fmt: skip
def test_what_is_no_list_of_files_is_refused(
    llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    assert "org/llama" in refused(hub_of(llama, said), monkeypatch)[0]


@pytest.mark.parametrize(
    "name",
    ["../x.json", "/x.json", "a/../../x.json", "a\0.json", "x" * 300 + ".json", "config.json/x.json", "a//x.json", "",
     "model.safetensors.index.json/x", "a\n\x1b[31m/../../x.json"],
)  # fmt: skip
def test_a_name_that_is_no_file_s_is_refused_or_left(
    llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    files = {**llama, name: b"{}"}
    with (
        asked(hub_of(files, described(files), lambda n: (200, {}, files.get(n, b"{}"))), monkeypatch),
        suppress(W8A8Error),
    ):
        Repository.open(HubFolder.find("org/llama", None))


@pytest.mark.parametrize(("number", "size"), [(10_001, 2), (9, 2**29)])
def test_too_much_beside_the_weights_is_not_fetched(
    llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int, size: int
) -> None:
    said = described(llama)
    said["siblings"] += [{"rfilename": f"{n}.json", "size": size, "blobId": "0" * 40} for n in range(number)]
    line, sent = refused(hub_of(llama, said), monkeypatch)
    assert f"{number + 2 if number > 9 else 11:,} files lie beside" in line
    assert sent < 5 * len(MB)


def endless() -> Iterator[bytes]:
    while True:
        yield MB


@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_an_answer_without_end_is_left(
    llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(session, "ANSWER_BYTES", 5 * len(MB))
    headers = {"Location": "/api/elsewhere"} if status == 302 else {}
    assert refused(lambda _: (status, headers, endless()), monkeypatch)[1] < 30 * len(MB)
    if status != 200:
        hub = hub_of(llama, described(llama), lambda _: (status, headers, endless()))
        assert refused(hub, monkeypatch)[1] < 200 * len(MB)


def test_an_answer_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def drip() -> Iterator[bytes]:
        while True:
            time.sleep(0.05)
            yield b" "

    monkeypatch.setattr(session, "ANSWER_SECONDS", 0.5)
    assert "does not end" in refused(lambda _: (200, {}, drip()), monkeypatch)[0]


def test_what_comes_packed_is_not_unpacked(llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zstandard.compress(b" " * 10**8)
    packed = {"Content-Encoding": "zstd"}
    assert "packed" in refused(lambda _: (200, packed, bomb), monkeypatch)[0]
    assert "packed" in refused(hub_of(llama, described(llama), lambda _: (200, packed, bomb)), monkeypatch)[0]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3", 3), ("-3", 0), ("31536000", 31536000), ("", 0), ("soon", 0), ("9" * 5000, 0), ("nan", 0), ("1e9", 0),
     ("Mon, 01 Jan 2001 00:00:00 +99999999999999", 0), ("Mon, 01 Jan 0001 00:00:00 -0000", 0)],
)  # fmt: skip
def test_a_wait_is_a_number_whatever_is_said(text: str, seconds: float) -> None:
    assert session.retry_after(text) == seconds


def test_what_killed_runs_have_left_of_headers_leaves_with_the_next(
    llama: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with asked(hub_of(llama, described(llama)), monkeypatch):
        running = Repository.open(HubFolder.find("org/llama", None))
        left, new = tmp_path / f"{SCRATCH}left", tmp_path / f"{SCRATCH}new"
        for folder in (left, new):
            folder.mkdir()
            (folder / "config.json").touch()
        for folder in (left, running.checkpoint.path):
            os.utime(folder, (0, 0))
        Repository.open(HubFolder.find("org/llama", None))
    assert {*tmp_path.iterdir()} == {new, running.checkpoint.path}
    del running
    assert [*tmp_path.iterdir()] == [new]
