"""A real S3 server in a process of its own (moto's), and before it a proxy through which requests fail now and then."""

import http.client
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from tests.servers import free_port, listening, started

BUCKET = "models"
_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}

Fault = HTTPStatus | str | None


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for: `key` is the object's, below the bucket."""

    method: str
    key: str
    query: str


@dataclass
class Bucket:
    """A bucket behind a proxy at `url`, reached by a client with the environment `env`; `system` asks without proxy.

    `fault` names what goes wrong with a request: a status to answer, "drop" (no answer), or "cut" (half of it). `sent`
    counts the bytes of answers.
    """

    url: str
    system: Any
    fault: Callable[[Request], Fault] = lambda _: None
    requests: list[Request] = field(default_factory=list)
    sent: int = 0

    @property
    def env(self) -> Mapping[str, str]:
        """What points a client here; one that fails is asked again by this tool, not by the client's library."""
        return {"AWS_ENDPOINT_URL_S3": self.url, "AWS_MAX_ATTEMPTS": "1", **KEYS}

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder; return its address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.system.pipe_file(f"{BUCKET}/{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def read(self, prefix: str) -> dict[str, bytes]:
        """All objects below a prefix, by the rest of their keys."""
        below = f"{BUCKET}/{prefix}/"
        return {key.removeprefix(below): self.system.cat_file(key) for key in self.system.find(below)}

    def unfinished(self) -> list[str]:
        """The keys of multipart uploads that were neither completed nor aborted."""
        return [upload["Key"] for upload in self.system.list_multipart_uploads(BUCKET)]


KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server(output: Path) -> Iterator[str]:
    """moto's server; yields its URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            with urlopen(f"{url}/moto-api/", timeout=5):
                return True
        except OSError:
            return False

    with started([sys.executable, "-m", "moto.server", "-p", str(port)], output, KEYS) as running:
        running.wait_until(ready, "ready")
        yield url


@contextmanager
def bucket_at(server: str) -> Iterator[Bucket]:
    """An empty bucket of the server, behind a proxy."""
    from s3fs import S3FileSystem

    system = S3FileSystem(endpoint_url=server, key="test", secret="test", use_listings_cache=False)
    with suppress(FileNotFoundError):
        system.rm(BUCKET, recursive=True)
    with suppress(FileExistsError):
        system.mkdir(BUCKET)
    with _proxy(server, Bucket("", system)) as bucket:
        yield bucket


@contextmanager
def _proxy(server: str, bucket: Bucket) -> Iterator[Bucket]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self._body()
            path, _, query = self.path.partition("?")
            key = unquote(urlsplit(path).path).removeprefix(f"/{BUCKET}").lstrip("/")
            request = Request(self.command, key, query)
            bucket.requests.append(request)
            fault = bucket.fault(request)
            if fault == "drop":
                self.close_connection = True
                return
            if isinstance(fault, HTTPStatus):
                code = {HTTPStatus.SERVICE_UNAVAILABLE: "SlowDown", HTTPStatus.FORBIDDEN: "AccessDenied"}
                error = f"<Error><Code>{code.get(fault, 'InternalError')}</Code><Message>no</Message></Error>"
                self._answer(fault, {"Content-Type": "application/xml"}, error.encode())
                return
            connection = http.client.HTTPConnection(server.removeprefix("http://"))
            headers = {k: v for k, v in self.headers.items() if k.lower() not in (*_HOP, "expect")}
            connection.request(self.command, self.path, body, headers | ({"Content-Length": str(len(body))}))
            answer = connection.getresponse()
            content = answer.read()
            sent = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP}
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self._answer(answer.status, sent, content, cut=fault == "cut", length=length)
            connection.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass  # noqa: N815

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(
            self, status: int, headers: Mapping[str, str], body: bytes, *, cut: bool = False, length: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": length or str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                bucket.sent += len(body)
                with suppress(ConnectionError):
                    self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

        def log_message(self, *args: Any, **kwargs: Any) -> None:
            pass

    with listening(Handler) as url:
        bucket.url = url
        yield bucket


def is_shard(request: Request) -> bool:
    """Whether a request is about a shard."""
    return re.search(r"\.safetensors$", request.key) is not None
