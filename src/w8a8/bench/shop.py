"""A Hub for `w8a8 bench stream`: serves one folder as the model `org/model`, at a set number of bytes a second.

`python -m w8a8.bench.shop FOLDER BYTES_PER_SECOND` prints its address, and runs until its standard input ends. It
answers what huggingface_hub and `w8a8 quantize` ask of the Hub for a download, and no more.
"""

import json
import re
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from w8a8.checkpoint.stream import file_sha256

COMMIT = "c0ffee" * 6 + "beef"
REPOSITORY = "org/model"
CHUNK = 1 << 18


class Pace:
    """Lets bytes pass at a rate, whoever sends them."""

    def __init__(self, rate: float) -> None:
        self._rate, self._next, self._lock = rate, 0.0, threading.Lock()

    def pass_on(self, nbytes: int) -> None:
        """Wait until `nbytes` more may go."""
        with self._lock:
            self._next = max(self._next, time.monotonic()) + nbytes / self._rate
            wait = self._next - time.monotonic()
        if wait > 0:
            time.sleep(wait)


def main() -> None:
    """Serve until standard input ends."""
    folder, pace = Path(sys.argv[1]), Pace(float(sys.argv[2]))
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    digests = {name: file_sha256(path) for name, path in files.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            name = path.rpartition("/")[2]
            if path.startswith(f"/{REPOSITORY}/resolve/") and name in files:
                self._file(name)
            elif path.startswith(f"/api/models/{REPOSITORY}"):
                self._json(_tree(files, digests) if "/tree/" in path else _model(files, digests))
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        do_HEAD = do_GET  # noqa: N815

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _file(self, name: str) -> None:
            size = files[name].stat().st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            begin = int(asked[1]) if asked else 0
            end = min(int(asked[2]) + 1, size) if asked and asked[2] else size
            self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
            if asked:
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            self.send_header("Content-Length", str(end - begin))
            self.send_header("ETag", f'"{digests[name]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            with suppress(ConnectionError), files[name].open("rb") as file:  # a client may have enough
                file.seek(begin)
                while begin < end and (chunk := file.read(min(CHUNK, end - begin))):
                    pace.pass_on(len(chunk))
                    self.wfile.write(chunk)
                    begin += len(chunk)

        def log_message(self, *_: Any, **__: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    sys.stdin.read()


def _model(files: dict[str, Path], digests: dict[str, str]) -> Any:
    siblings = [
        {"rfilename": name, "size": path.stat().st_size, "blobId": COMMIT,
         "lfs": {"sha256": digests[name], "size": path.stat().st_size, "pointerSize": 134}}
        for name, path in files.items()
    ]  # fmt: skip
    return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}


def _tree(files: dict[str, Path], digests: dict[str, str]) -> Any:
    return [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": digests[name]}
        for name, path in files.items()
    ]


if __name__ == "__main__":
    main()
