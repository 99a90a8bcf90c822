"""The HTTP session of huggingface_hub, within bounds of time and memory, whatever a server answers.

By itself it waits for ever for a server that says nothing, sleeps as long as one asks it to, and reads answers of any
length, which may unpack to a thousand times of it.
"""

import re
import time
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

SILENCE_SECONDS = 120.0
"""How long a server may say nothing, where nobody asks for less: it may look through what was uploaded."""
LONGEST_WAIT_SECONDS = 300.0
"""The longest wait, whatever a server asks for."""
ANSWER_BYTES = 32_000_000
ANSWER_SECONDS = 300.0
"""What an answer may have that is no file: of a list of files, a hundred thousand take as much."""


@cache
def bound() -> None:
    """Have all further requests of huggingface_hub in this process answered within bounds."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def client() -> Any:
        made = default_client_factory()
        made.timeout = SILENCE_SECONDS
        made.headers["Accept-Encoding"] = "identity"
        made.event_hooks = {**made.event_hooks, "response": [*made.event_hooks["response"], _check]}
        return made

    set_client_factory(client)


def retry_after(text: str) -> float:
    """Seconds that a server asks to wait, given as a number or as a date; 0 for anything else."""
    if re.fullmatch(r"\d{1,9}", text):
        return float(text)
    try:
        return max(parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _check(response: Any) -> None:
    """Read what is no file, and let nobody sleep for days. Raises `HTTPError` for what is packed, or has no end."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    headers, request = response.headers, response.request
    if headers.get("Content-Encoding", "identity") != "identity":
        raise HTTPError(f"the answer came packed ({headers['Content-Encoding']!r:.40}), though it was not asked to be")
    if "Retry-After" in headers:
        headers["Retry-After"] = str(int(min(retry_after(headers["Retry-After"]), LONGEST_WAIT_SECONDS)))
    if "RateLimit" in headers:
        headers["RateLimit"] = re.sub(r"\bt=\d+", _shortened, headers["RateLimit"])
    is_file = request.method == "GET" and ("/api/" not in request.url.path or "/resolve" in request.url.path)
    if is_file and response.status_code < 300:
        return
    content, end = bytearray(), time.monotonic() + ANSWER_SECONDS
    for piece in response.iter_raw():
        content += piece
        if len(content) > ANSWER_BYTES or time.monotonic() > end:
            raise HTTPError(f"the answer does not end: {len(content):,} bytes so far")
    response._content = bytes(content)  # as its `read` does


def _shortened(match: re.Match[str]) -> str:
    return f"t={min(int(match[0][2:20]), int(LONGEST_WAIT_SECONDS))}"
