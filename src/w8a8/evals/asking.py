"""Asks a server, or several that serve the same model, many questions at once; reports each reply as it comes.

A request that fails, after the client's own retries, is a reply with an error. A server that cannot be reached, refuses
the key or lacks the model would fail them all: asking for its models first finds that. If the server goes away later,
a number of failures in a row ends the run.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from w8a8.errors import MissingExtraError, ServerError
from w8a8.serve.client import connect, connect_async, explained, not_the_api

RETRIES = 7
"""Retries of one request, after 0.5 s, then 1, 2, 4, 8, 8, 8 (less a random quarter), or when the server says."""

FAILURES_IN_A_ROW = 8
"""Failed requests in a row that end the run; twice the concurrency, if that is more."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server: its base URL (most end in `/v1`) and its key; `others` serve the same model."""

    base_url: str
    api_key: str
    timeout: float = 600
    """Seconds that each try of a request may take."""
    others: tuple[str, ...] = ()

    @property
    def urls(self) -> tuple[str, ...]:
        """The base URLs of all servers."""
        return self.base_url, *self.others

    @property
    def about(self) -> str:
        """The base URLs as a result may say them, without credentials."""
        parts = map(urlsplit, self.urls)
        return ", ".join(each._replace(netloc=each.netloc.rpartition("@")[2]).geturl() for each in parts)


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a server lists, the owner it names, and its context in tokens, where the server says it."""

    name: str
    owner: str
    context: int | None = None

    @property
    def file_name(self) -> str:
        """The last part of its name, as a part of a file name."""
        return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(self.name).name) or "model"


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply: the text and why it ended, or the error; tokens as the server counts them.

    `scores`, where log-probabilities were asked for, has each token's, None for a first one, and whether it is the
    likeliest there.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    scores: tuple[tuple[float | None, bool], ...] = ()


def find_model(server: Server, name: str | None) -> Model:
    """Find the model `name`, or the only one that the first server lists; the others have to have it, too.

    Raises ServerError, also if there is none.
    """
    found = _find_model(server.base_url, server.api_key, name)
    for url in server.others:
        _find_model(url, server.api_key, found.name)
    return found


def _find_model(url: str, api_key: str, name: str | None) -> Model:
    with _explained(url), connect(url, api_key, max_retries=0, timeout=30) as client:
        listed = {str(model.id): model for model in client.models.list().data}
    known = ", ".join(list(listed)[:5]) or "none"
    if name is None and len(listed) != 1:
        raise ServerError(f"{url}: which model? --model names one of those it lists: {known}")
    chosen = name if name is not None else next(iter(listed))
    if chosen not in listed:
        raise ServerError(f"{url}: it has no model {chosen}; it lists: {known}")
    owner, context = (getattr(listed[chosen], name, None) for name in ("owned_by", "max_model_len"))
    return Model(chosen, str(owner or ""), context if isinstance(context, int) and context > 1 else None)


def ask_all(
    server: Server,
    requests: Mapping[int, Mapping[str, Any]],
    *,
    concurrency: int,
    answered: Callable[[int, Reply, float], None],
) -> None:
    """Send `requests`, `concurrency` at a time to each server, whichever is free first.

    `answered(key, reply, seconds since the start)` is called for each reply. A request with `messages` goes to the chat
    endpoint, one with `prompt` to the completions endpoint. Raises ServerError if a server refuses them all; replies
    before that have been reported.
    """
    asyncio.run(_ask_all(server, requests, concurrency, answered))


async def _ask_all(
    server: Server,
    requests: Mapping[int, Mapping[str, Any]],
    concurrency: int,
    answered: Callable[[int, Reply, float], None],
) -> None:
    start = time.monotonic()
    waiting = iter(requests.items())

    async def work(client: Any, failures: FailuresInARow) -> None:
        for key, request in waiting:
            reply = await _ask(client, request)
            answered(key, reply, time.monotonic() - start)
            failures.count(reply)

    try:
        async with AsyncExitStack() as clients, asyncio.TaskGroup() as group:
            for url in server.urls:
                client = connect_async(url, server.api_key, max_retries=RETRIES, timeout=server.timeout)
                await clients.enter_async_context(client)
                failures = FailuresInARow(url, min(len(requests), max(FAILURES_IN_A_ROW, 2 * concurrency)))
                for _ in range(min(concurrency, len(requests))):
                    group.create_task(work(client, failures))
    except ExceptionGroup as failed:  # the first ended the others
        raise failed.exceptions[0] from None


@dataclass
class FailuresInARow:
    """Counts failed requests in a row, and gives the server up when `allowed` is reached."""

    base_url: str
    allowed: int
    number: int = 0

    def count(self, reply: Reply) -> None:
        """Count a reply. Raises ServerError."""
        self.number = self.number + 1 if reply.error else 0
        if self.number >= self.allowed:
            raise ServerError(f"{self.base_url}: the last {self.number} requests failed: {reply.error}")


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
    """Read the first choice of an answer; missing fields raise Python's own errors."""
    choice = answer.choices[0]
    text, reason = choice.message.content if chat else choice.text, choice.finish_reason
    if not (isinstance(text, str | None) and isinstance(reason, str | None)):
        raise TypeError("text and reason must be strings")
    text = (text or "").encode(errors="replace").decode()  # a lone surrogate cannot be written as UTF-8
    scores = () if chat else _scores(getattr(choice, "logprobs", None))
    return Reply(text, reason, _count(answer, "prompt_tokens"), _count(answer, "completion_tokens"), scores=scores)


def _scores(found: Any) -> tuple[tuple[float | None, bool], ...]:
    """Read the log-probabilities of a completion's tokens, in nats; missing fields raise Python's own errors."""
    if found is None or found.token_logprobs is None:
        return ()
    pairs = zip(found.token_logprobs, found.top_logprobs, strict=True)
    return tuple((None, False) if own is None else (float(own), own == max(tops.values())) for own, tops in pairs)


def _count(answer: Any, name: str) -> int:
    """Tokens as the server counts them, 0 if it does not."""
    count = getattr(getattr(answer, "usage", None), name, None)
    return count if isinstance(count, int) else 0


@contextmanager
def _explained(base_url: str) -> Iterator[None]:
    """Turn the client's errors, and answers that lack a field, into ServerError: one line that says what to do."""
    openai = _openai()
    with explained(base_url):
        try:
            yield
        except openai.APITimeoutError as error:
            raise ServerError(f"{base_url}: no answer in time; give more with --timeout") from error
        except (AttributeError, LookupError, TypeError, RecursionError) as error:
            raise not_the_api(base_url) from error


def _openai() -> Any:
    try:
        import openai
    except ModuleNotFoundError as missing:
        raise MissingExtraError("evaluating needs the openai client: pip install 'w8a8[eval]'") from missing
    return openai
