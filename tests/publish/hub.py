"""A Hub on this machine that takes uploads, over real HTTP: the endpoints huggingface_hub asks for, and hf_xet.

Large files come as LFS objects, or through Xet as chunks packed into xorbs. Of the latter it keeps the bytes as they
come, and of a file committed so its hash. What it does not have itself it asks another Hub for, as if it were its own.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from huggingface_hub import constants

from tests.servers import listening

TOKEN = "hf_the_right_one"
COMMIT = "c0ffee" * 6 + "beef"

_REPO = r"(?P<repo>[^/]+/[^/]+)"
_BATCH = re.compile(rf"/{_REPO}\.git/info/lfs/objects/batch")
_API = re.compile(rf"/api/models/{_REPO}(/(?P<what>preupload|commit|xet-write-token|revision)/main)?")
_FILE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_XORB = re.compile(r"/cas/v1/xorbs/default/(?P<hash>[0-9a-f]{64})")


@dataclass
class Repository:
    """What was committed."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """A running Hub.

    With `uploads_left` it breaks the connection of every further upload, or answers `then`; `readonly` refuses to make
    repositories and commits. `objects` are the large files it has, `received` how often each was sent whole.

    `fault` may name what goes wrong with a request, given method and path, before anything is done: a status to answer,
    with the Retry-After `wait`, or "cut": half of an upload is read, and the connection ends. `elsewhere` is the
    address of another Hub, `large` are the endings of names that are large files. These it takes in parts of
    `part_bytes`, if that is set.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)
    xorbs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uploads_left: int | None = None
    then: HTTPStatus | None = None
    readonly: bool = False
    fault: Callable[[str, str], HTTPStatus | str | None] = lambda _method, _path: None
    wait: str = ""
    elsewhere: str = ""
    part_bytes: int = 0
    parts: dict[str, bytes] = field(default_factory=dict)
    large: tuple[str, ...] = (".safetensors", "tokenizer.json")
    lock: Lock = field(default_factory=Lock)


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str, code: str = "") -> None:
        super().__init__(status, message)
        self.status, self.message, self.code = status, message, code


@contextmanager
def receiving_hub() -> Iterator[Hub]:
    """A Hub without repositories, until the block ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            length = int(self.headers["Content-Length"] or 0)
            fault = hub.fault(self.command, path)
            body = self.rfile.read(length // 2 if fault == "cut" else length)
            hub.requests.append(f"{self.command} {path}")
            if fault == "cut":
                self.close_connection = True
                return
            try:
                if isinstance(fault, HTTPStatus):
                    raise _RefusedError(fault, "not now")
                if hub.elsewhere and self.command in ("GET", "HEAD") and not _is_own(hub, path):
                    self._relay()
                    return
                if found := _FILE.fullmatch(path):
                    self._send(HTTPStatus.OK, hub.repositories[found["repo"]].files[found["file"]])
                    return
                if path.startswith("/part/"):
                    hub.parts[path.removeprefix("/part/")] = body
                    self._answer(HTTPStatus.OK, {}, {"ETag": "came"})
                    return
                if path.startswith("/whole/"):
                    asked = json.loads(body)
                    numbers = [part["partNumber"] for part in asked["parts"]]
                    path = f"/lfs/{asked['oid']}"
                    body = b"".join(hub.parts.pop(f"{asked['oid']}/{number}") for number in numbers)
                if path.startswith("/lfs/"):
                    if not _take(hub, path.removeprefix("/lfs/"), body):
                        self.close_connection = True
                        return
                    self._answer(HTTPStatus.OK, {})
                    return
                if not path.startswith("/cas/") and self.headers["Authorization"] != f"Bearer {TOKEN}":
                    raise _RefusedError(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
                self._answer(HTTPStatus.OK, _reply(hub, self.command, path, body))
            except _RefusedError as refused:
                headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
                headers |= {"Retry-After": hub.wait} if hub.wait else {}
                self._answer(refused.status, {"error": refused.message}, headers)

        do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(value).encode(), headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, text)
            self.end_headers()
            with suppress(ConnectionError):  # the client may have been killed
                self.wfile.write(body)

        def _relay(self) -> None:
            """Answer what the other Hub answers."""
            asked = {name: self.headers[name] for name in ("Range", "Accept-Encoding") if self.headers[name]}
            try:
                with urlopen(Request(hub.elsewhere + self.path, headers=asked, method=self.command)) as answer:
                    self._send(answer.status, answer.read(), dict(answer.headers))
            except HTTPError as error:
                self._send(error.code, error.read(), dict(error.headers))
            except (HTTPException, OSError):
                self.close_connection = True

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

    with listening(Handler) as url:
        hub.url = url
        yield hub


def ask(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Make `hub` the one that this process, and those that it forks, know and may write to; without Xet."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setenv("HF_TOKEN", TOKEN)


def _is_own(hub: Hub, path: str) -> bool:
    """Whether it has the repository that a path speaks of, or the path speaks of none."""
    found = _API.match(path) or _FILE.match(path)
    return found is None or found["repo"] in hub.repositories


def _take(hub: Hub, oid: str, body: bytes) -> bool:
    """Store an uploaded object, if it may still come and is what its name says."""
    with hub.lock:
        if hub.uploads_left is not None:
            hub.uploads_left -= 1
            if hub.uploads_left < 0:
                if hub.then:
                    raise _RefusedError(hub.then, "no more for now")
                return False
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "not that object")
        hub.objects[oid] = body
        hub.received[oid] = hub.received.get(oid, 0) + 1
    return True


def _reply(hub: Hub, method: str, path: str, body: bytes) -> Any:
    if path == "/api/whoami-v2":
        return {"type": "user", "name": "me", "auth": {}}
    if path.startswith("/cas/"):
        return _cas(hub, path, body)
    if path.startswith("/verify/"):
        if path.removeprefix("/verify/") not in hub.objects:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "that object did not come")
        return {}
    if path == "/api/validate-yaml":
        return {"errors": [], "warnings": []}
    if path == "/api/repos/create":
        return _create(hub, json.loads(body))
    if found := _BATCH.fullmatch(path):
        return {"objects": [_action(hub, entry) for entry in json.loads(body)["objects"]]}
    found = _API.fullmatch(path)
    repository = hub.repositories.get(found["repo"]) if found else None
    if found is None or repository is None:
        raise _RefusedError(HTTPStatus.NOT_FOUND, "Repository not found", "RepoNotFound")
    if found["what"] == "preupload":
        return {"files": [_mode(hub, repository, file) for file in json.loads(body)["files"]]}
    if found["what"] == "xet-write-token":
        return {"casUrl": f"{hub.url}/cas", "accessToken": "for Xet", "exp": 2**32}
    if found["what"] == "commit":
        if hub.readonly:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "you may read only")
        return _commit(hub, found["repo"], [json.loads(line) for line in body.splitlines()])
    siblings = [_sibling(hub, *file) for file in repository.files.items()]
    return {"id": found["repo"], "private": repository.private, "sha": COMMIT, "siblings": siblings}


def _sibling(hub: Hub, name: str, content: bytes) -> dict[str, Any]:
    known = {"rfilename": name, "size": len(content), "blobId": _blob(content)}
    large = {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}}
    return known | (large if name.endswith(hub.large) else {})


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _cas(hub: Hub, path: str, body: bytes) -> Any:
    """Xet's storage, version 1: takes xorbs and the shards that say what they hold, and has no chunk to share."""
    if found := _XORB.fullmatch(path):
        hub.xorbs[found["hash"]] = body
        return {"was_inserted": True}
    if path == "/cas/v1/shards":
        return {"result": 1}
    raise _RefusedError(HTTPStatus.NOT_FOUND, "not here")


def _create(hub: Hub, asked: dict[str, Any]) -> Any:
    if hub.readonly:
        raise _RefusedError(HTTPStatus.FORBIDDEN, "you may not create here")
    private = asked.get("visibility") == "private" or asked.get("private") is True
    name = f"{asked['organization']}/{asked['name']}"
    hub.repositories[name] = Repository(private)
    return {"url": f"{hub.url}/{name}"}


def _mode(hub: Hub, repository: Repository, file: dict[str, Any]) -> Any:
    """Large files are those the Hub's own .gitattributes names; what it has is named by its hash."""
    large = file["path"].endswith(hub.large)
    content = repository.files.get(file["path"])
    oid = None
    if content is not None:
        oid = hashlib.sha256(content).hexdigest() if large else _blob(content)
    return {
        "path": file["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
        "oid": oid,
    }


def _action(hub: Hub, entry: dict[str, Any]) -> Any:
    if entry["oid"] in hub.objects:
        return entry
    size = hub.part_bytes
    numbers = range(1, -(-entry["size"] // size) + 1) if size else ()
    header = {str(number): f"{hub.url}/part/{entry['oid']}/{number}" for number in numbers}
    upload: dict[str, Any] = {"href": f"{hub.url}/{'whole' if size else 'lfs'}/{entry['oid']}"}
    upload |= {"header": {**header, "chunk_size": str(size)}} if size else {}
    return {**entry, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/verify/{entry['oid']}"}}}


def _commit(hub: Hub, name: str, lines: list[dict[str, Any]]) -> Any:
    repository = hub.repositories[name]
    oids = {line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
    if not hub.xorbs and (lost := oids - hub.objects.keys()):  # it does not look into what came through Xet
        raise _RefusedError(HTTPStatus.UNPROCESSABLE_ENTITY, f"no large file {lost.pop()}")
    for line in lines:
        value = line["value"]
        if line["key"] == "header":
            repository.messages.append(value["summary"])
        elif line["key"] == "file":
            repository.files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            repository.files[value["path"]] = hub.objects.get(value["oid"], f"sha256:{value['oid']}".encode())
        else:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, line["key"])
    return {"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
