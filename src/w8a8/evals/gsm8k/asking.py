"""Asks a server many questions at once, and says each outcome as it comes.

One request that fails, after the client's own retries, is an outcome like another. A server that is not there, refuses
the key or does not know the model fails them all, so that is found by asking for its models first; and if it goes away
later, so many failures in a row end the run.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from w8a8.errors import MissingExtraError, ServerError
from w8a8.serve.client import explained, not_the_api

RETRIES = 7
"""Of one request, waiting 0.5 s, then 1, 2, 4, 8, 8, 8 (less a random quarter), or as long as the server says."""

FAILURES_IN_A_ROW = 8
"""After so many failed requests, or twice as many as are under way at once, the server is given up."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server: its base URL, ending in `/v1` or what the server has instead, and its key."""

    base_url: str
    api_key: str
    timeout: float = 600
    """Seconds that one try of a request may take."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a server has, and who says so."""

    name: str
    owner: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the text and why it ended, or what went wrong; tokens as the server counts them."""

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


def find_model(server: Server, name: str | None) -> Model:
    """The model `name`, or the only one the server lists. Raises `ServerError`, also where it has no such model."""
    openai = _openai()
    with (
        _explained(server.base_url),
        openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=30) as client,
    ):
        listed = {str(model.id): str(getattr(model, "owned_by", "")) for model in client.models.list().data}
    known = ", ".join(list(listed)[:5]) or "none"
    if name is None and len(listed) != 1:
        raise ServerError(f"{server.base_url}: which model? --model names one of those it lists: {known}")
    chosen = name if name is not None else next(iter(listed))
    if chosen not in listed:
        raise ServerError(f"{server.base_url}: it has no model {chosen}; it lists: {known}")
    return Model(chosen, listed[chosen])


def ask_all(
    server: Server,
    requests: Mapping[int, Mapping[str, Any]],
    *,
    concurrency: int,
    say: Callable[[int, Reply, float], None],
) -> None:
    """Send `requests`, `concurrency` at a time, and `say(key, reply, seconds since the start)` as they come back.

    A request with `messages` goes to the chat endpoint, one with `prompt` to the one for completions. Raises
    `ServerError` if the server refuses them all; what was said before stays said.
    """
    asyncio.run(_ask_all(server, requests, concurrency, say))


async def _ask_all(
    server: Server,
    requests: Mapping[int, Mapping[str, Any]],
    concurrency: int,
    say: Callable[[int, Reply, float], None],
) -> None:
    start = time.monotonic()
    waiting = iter(requests.items())
    failures = _Failures(server.base_url, min(len(requests), max(FAILURES_IN_A_ROW, 2 * concurrency)))

    async def work(client: Any) -> None:
        for key, request in waiting:
            reply = await _ask(client, request)
            say(key, reply, time.monotonic() - start)
            failures.count(reply)

    client = _openai().AsyncOpenAI(
        base_url=server.base_url, api_key=server.api_key, max_retries=RETRIES, timeout=server.timeout
    )
    try:
        async with client, asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(work(client))
    except ExceptionGroup as failed:  # the first ended the others
        raise failed.exceptions[0] from None


@dataclass
class _Failures:
    base_url: str
    allowed: int
    in_a_row: int = 0

    def count(self, reply: Reply) -> None:
        self.in_a_row = self.in_a_row + 1 if reply.error else 0
        if self.in_a_row >= self.allowed:
            raise ServerError(f"{self.base_url}: the last {self.in_a_row} requests failed: {reply.error}")


async def _ask(client: Any, request: Mapping[str, Any]) -> Reply:
    openai = _openai()
    chat = "messages" in request
    endpoint = client.chat.completions if chat else client.completions
    try:
        with _explained(str(client.base_url)):
            return _read(await endpoint.create(**request), chat=chat)
    except ServerError as error:
        cause = error.__cause__
        if isinstance(cause, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError):
            raise
        if isinstance(cause, openai.BadRequestError) and "chat template" in str(error):
            raise ServerError(f"{error}; --completions asks a model that has none") from cause
        return Reply(error=str(error))


def _read(answer: Any, *, chat: bool) -> Reply:
    """The first choice of an answer, which may be anything: what is missing raises as Python does."""
    choice = answer.choices[0]
    text, reason = choice.message.content if chat else choice.text, choice.finish_reason
    if not (isinstance(text, str | None) and isinstance(reason, str | None)):
        raise TypeError("its text is none")
    text = (text or "").encode(errors="replace").decode()  # half a surrogate pair could not be written
    return Reply(text, reason, _count(answer, "prompt_tokens"), _count(answer, "completion_tokens"))


def _count(answer: Any, name: str) -> int:
    """Tokens, as far as the server counts them."""
    count = getattr(getattr(answer, "usage", None), name, None)
    return count if isinstance(count, int) else 0


@contextmanager
def _explained(base_url: str) -> Iterator[None]:
    """Turn the client's errors, and what an answer lacks, into `ServerError`: one line, and what to do."""
    openai = _openai()
    with explained(base_url):
        try:
            yield
        except openai.APITimeoutError as error:
            raise ServerError(f"{base_url}: no answer in time; --timeout gives it more") from error
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise not_the_api(base_url) from error


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as missing:
        raise MissingExtraError("evaluating needs the openai client: pip install 'w8a8[eval]'") from missing
    return openai
