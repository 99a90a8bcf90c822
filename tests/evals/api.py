"""A small server that speaks OpenAI's API over real HTTP, answers sums, and fails when told to."""

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.servers import listening

KEY = "sesame"
MODEL = "org/adder"


@dataclass
class Api:
    """What the server does, and what it was asked."""

    url: str = ""
    failures: dict[int, list[int]] = field(default_factory=dict)
    """By question: what to answer first, an HTTP status, or 0 for no answer in time."""
    down: bool = False
    """Whether every request fails, so that no retry helps."""
    delay: float = 0
    refusal: str = "no luck"
    replies: dict[int, Any] = field(default_factory=dict)
    """By question: the whole answer, where it is not the usual one."""
    models: Any = None
    """The whole list of models, where it is not the usual one."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self) -> list[int]:
        """The questions asked, in order of arrival."""
        return [number_of(request) for request in self.requests]


def write_data(folder: Path, questions: int = 20, examples: int = 9) -> Path:
    """Invented questions, as GSM8K spells them; question i is `i + 2i`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, start in (("train", examples, 1000), ("test", questions, 0)):
        rows = [
            {
                "question": f"Box {i}: Ann has {i} pears and buys {2 * i} more. How many has she?",
                "answer": f"She has {i}+{2 * i}=<<{i}+{2 * i}={3 * i}>>{3 * i:,} pears.\n#### {3 * i:,}",
            }
            for i in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def number_of(request: dict[str, Any]) -> int:
    """Which question a request is about."""
    text = request["messages"][-1]["content"] if "messages" in request else request["prompt"]
    return int(re.findall(r"Box (\d+)", text)[-1])


def answer(i: int) -> str:
    """Right for two questions of three; of those every other without the format."""
    return (
        f"That makes {3 * i + (i % 3 == 0)} pears." if i % 2 else f"{i} and {2 * i}.\n#### {3 * i + (i % 3 == 0):,}.00"
    )


@contextmanager
def running_api(**how: Any) -> Iterator[Api]:
    """The server, on a port of its own."""
    api = Api(**how)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self._allowed():
                self._send(200, api.models or {"data": [{"id": MODEL, "object": "model", "owned_by": "tests"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self._allowed():
                return
            i = number_of(request)
            with api.lock:
                api.requests.append(request)
                api.under_way += 1
                api.most_under_way = max(api.most_under_way, api.under_way)
                failing = api.failures.get(i, [])
                status = 503 if api.down else failing.pop(0) if failing else 200
            try:
                time.sleep(api.delay + (3 if status == 0 else 0))
                if status == 200:
                    self._send(200, api.replies.get(i, _reply(request, i)))
                else:
                    self._send(status or 200, {"error": {"message": f"{api.refusal} with {i}"}})
            finally:
                with api.lock:
                    api.under_way -= 1

        def _allowed(self) -> bool:
            if self.headers["Authorization"] == f"Bearer {KEY}":
                return True
            self._send(401, {"error": {"message": "wrong key"}})
            return False

        def _send(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                if status != 200:
                    self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client has hung up
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    with listening(Handler) as url:
        api.url = f"{url}/v1"
        yield api


def _reply(request: dict[str, Any], i: int) -> dict[str, Any]:
    chat = "messages" in request
    said = {"message": {"role": "assistant", "content": answer(i)}} if chat else {"text": answer(i)}
    return {
        "id": "1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, **said, "finish_reason": "length" if i == 7 else "stop"}],
        "usage": {"prompt_tokens": 100 + i, "completion_tokens": i, "total_tokens": 100 + 2 * i},
    }
