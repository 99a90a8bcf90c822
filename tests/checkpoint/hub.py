"""A Hub on this machine: the endpoints that huggingface_hub asks for when it looks up and downloads a model."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.servers import listening

COMMIT = "c0ffee" * 6 + "beef"

_CHUNK = 2**16
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?P<what>revision|tree)/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/(?P<what>resolve)/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Request:
    """What a client asked for."""

    method: str
    path: str
    token: str | None


@dataclass
class Hub:
    """A running Hub. `repositories` maps ids to files; `failing` makes it answer that status to everything.

    `fault` may name what goes wrong with a request for a file, given its name and the first byte asked for: a status to
    answer, or one of "cut", "byte" (one comes), "short", "long", "wrong" (at its start), "ruined" (at its end),
    "elsewhere" (a redirect to the server `other`). `wait` is its Retry-After. `pace` is called before a chunk of a file
    is sent, with its name and the byte it goes on at, and may take its time. `digests` are what it claims of a file
    instead of its SHA-256.
    Without `ranges` it sends whole files whatever is asked for, `lengths` are what it claims of a file instead of its
    length, and `redirecting` it sends every request for a file back to itself. `sent` counts the bytes of bodies.
    """

    url: str
    repositories: Mapping[str, Mapping[str, bytes]]
    gated: bool = False
    failing: HTTPStatus | None = None
    ranges: bool = True
    redirecting: bool = False
    lengths: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    requests: list[Request] = field(default_factory=list)
    fault: Callable[[str, int], HTTPStatus | str | None] = lambda _name, _begin: None
    wait: str = "0"
    pace: Callable[[str, int], None] = lambda _name, _begin: None
    other: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def downloads(self) -> set[str]:
        """Names of the files that were fetched."""
        asked = [_FILE.fullmatch(request.path) for request in self.requests if request.method == "GET"]
        return {match["file"] for match in asked if match}


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@contextmanager
def local_hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Serve `repositories`, each with one commit that is called `main` and `v1`, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(Request(self.command, path, self.headers["Authorization"]))
            try:
                body, headers = _answer(hub, path)
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
                begin = int(asked[1]) if asked else 0
                end = int(asked[2]) + 1 if asked and asked[2] else len(body)
                found = _FILE.fullmatch(path)
                name = found["file"] if found else ""
                fault = hub.fault(name, begin) if found and self.command == "GET" else None
                if isinstance(fault, HTTPStatus):
                    self._answer(fault, b"", {"Retry-After": hub.wait})
                    return
                if fault:
                    self._fail(fault, body, begin, end)
                    return
                if hub.redirecting and _FILE.fullmatch(path):
                    self._answer(HTTPStatus.FOUND, b"", {"Location": self.path})
                elif asked and hub.ranges and _FILE.fullmatch(path):
                    total = hub.lengths.get(path.rpartition("/")[2], str(len(body)))
                    body = body[begin:end]
                    whole = {"Content-Range": f"bytes {begin}-{begin + len(body) - 1}/{total}"}
                    self._answer(HTTPStatus.PARTIAL_CONTENT, body, {**headers, **whole}, name, begin)
                else:
                    self._answer(HTTPStatus.OK, body, headers, name)
            except _RefusedError as refused:
                self._answer(refused.status, b"", {"X-Error-Code": refused.code})

        def do_HEAD(self) -> None:
            self.do_GET()

        def _answer(
            self, status: HTTPStatus, body: bytes, headers: Mapping[str, str], name: str = "", begin: int = 0
        ) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                with suppress(ConnectionError):  # a client may have enough
                    for start in range(0, len(body), _CHUNK):
                        hub.pace(name, begin + start)
                        hub.sent += self.wfile.write(body[start : start + _CHUNK])

        def _fail(self, fault: str, body: bytes, begin: int, end: int) -> None:
            """Answer with what is not what was asked for."""
            if fault == "elsewhere":
                self._answer(HTTPStatus.FOUND, b"", {"Location": hub.other + self.path})
                return
            content = body[begin:end]
            if fault == "wrong":
                content = bytes([content[0] ^ 1]) + content[1:] if content else b""
            if fault == "ruined":
                content = content[:-64] + bytes(b ^ 0xFF for b in content[-64:])
            if fault == "long":
                content += b"more"
            sent = content[: len(content) // 2] if fault in ("cut", "short") else content
            sent = content[:1] if fault == "byte" else sent
            claimed = len(sent) if fault == "short" else len(content)
            self.send_response(HTTPStatus.PARTIAL_CONTENT if begin else HTTPStatus.OK)
            self.send_header("Content-Length", str(claimed))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{begin + claimed - 1}/{len(body)}")
            self.end_headers()
            with suppress(ConnectionError):
                self.wfile.write(sent)
            self.close_connection = fault in ("cut", "byte")

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

    with listening(Handler) as url:
        hub = Hub(url, repositories)
        yield hub


def _answer(hub: Hub, path: str) -> tuple[bytes, Mapping[str, str]]:
    """Body and headers for a path."""
    if hub.failing:
        raise _RefusedError(hub.failing, "")
    asked = _FILE.fullmatch(path) or _API.fullmatch(path)
    files = hub.repositories.get(asked["repo"]) if asked else None
    if asked is None or files is None:
        raise _RefusedError(HTTPStatus.NOT_FOUND, "RepoNotFound")
    if asked["revision"] not in {None, "main", "v1", COMMIT}:
        raise _RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound")
    if asked["what"] == "resolve":
        if hub.gated:
            raise _RefusedError(HTTPStatus.FORBIDDEN, "GatedRepo")
        content = files[asked["file"]]
        digest = (sha256 if _is_large(asked["file"]) else sha1)(content).hexdigest()
        return content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT}
    if asked["what"] == "tree":
        return _json(
            [{"type": "file", "path": n, "size": len(b), "oid": sha1(b).hexdigest()} for n, b in files.items()]
        )
    return _json({"id": asked["repo"], "sha": COMMIT, "siblings": [_sibling(hub, *file) for file in files.items()]})


def _sibling(hub: Hub, name: str, content: bytes) -> Mapping[str, Any]:
    """What the Hub says of a file, large ones by their SHA-256, others by git's SHA-1."""
    known = {"rfilename": name, "size": len(content), "blobId": sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    digest = hub.digests.get(name, sha256(content).hexdigest())
    return known | ({"lfs": {"sha256": digest, "size": len(content), "pointerSize": 134}} if _is_large(name) else {})


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _json(value: Any) -> tuple[bytes, Mapping[str, str]]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}
