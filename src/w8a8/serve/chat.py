"""`w8a8 chat`: a conversation with any OpenAI-compatible server, or with a checkpoint.

The embedded engine serves a checkpoint on a thread of this process, on a port of localhost with a key that nobody else
has. From there on both cases are the same: the `openai` client streams answers from an address. A model without a chat
template, whose server refuses to chat, completes the text instead.
"""

import base64
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from w8a8.errors import MissingExtraError, ServerError, UnreadableError, UsageError, first_line
from w8a8.reading import UnfitError, read_bytes
from w8a8.serve.client import IMAGE_FORMATS, address, connect, explained
from w8a8.serve.client import message as said
from w8a8.serve.vllm import check_dtype

COMPLETION_TOKENS = 256
"""Limit of a completed text: a base model does not know when to end."""

MAX_IMAGE_BYTES = 50_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How to answer; `None` leaves the choice to the server."""

    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its usage. `tokens_per_second` counts from the first token to the last, without the prompt."""

    model: str
    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    tokens_per_second: float | None

    @property
    def speed(self) -> str:
        """The length and speed, in one line."""
        rate = f", {self.tokens_per_second:.1f} tokens/s" if self.tokens_per_second else ""
        why = " (max tokens)" if self.finish_reason == "length" else ""
        return f"{self.completion_tokens} tokens{why} in {self.seconds:.1f} s{rate}"


@dataclass
class Chat:
    """A conversation with one model of one server."""

    client: Any
    model: str
    notice: Callable[[str], None]
    settings: Settings = Settings()
    system: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    completes: bool = False
    """Whether the model has no chat template, so that text is completed instead."""

    answer: Answer | None = None
    """The last answer, complete or stopped."""

    def ask(self, text: str, images: Sequence[str] = ()) -> Iterator[str]:
        """Send a message with images as data: URLs; yield the answer piece by piece.

        An answer that is not read to its end stands in the conversation as far as it was read. Raises `ServerError`.
        """
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        with _explained(str(self.client.base_url)):
            stream = self._send(message, text)
            yield from self._read(stream, message)

    def _send(self, message: dict[str, Any], text: str) -> Any:
        import openai

        if not self.completes:
            system = [{"role": "system", "content": self.system}] if self.system else []
            try:
                return self.client.chat.completions.create(
                    messages=[*system, *self.messages, message], **self._options(self.settings.max_tokens)
                )
            except openai.BadRequestError as error:
                if "chat template" not in said(error) or not isinstance(message["content"], str):
                    raise
            self.completes = True
            self.notice(f"{self.model} has no chat template: it completes the text, one message at a time")
        if not isinstance(message["content"], str):
            raise UsageError(f"{self.model} has no chat template, and so takes no images")
        return self.client.completions.create(
            prompt=text, **self._options(self.settings.max_tokens or COMPLETION_TOKENS)
        )

    def _options(self, max_tokens: int | None) -> dict[str, Any]:
        given = {"max_tokens": max_tokens, "temperature": self.settings.temperature}
        return {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in given.items() if value is not None},
        }

    def _read(self, stream: Any, message: dict[str, Any]) -> Iterator[str]:
        start, first, last = time.perf_counter(), 0.0, 0.0
        text, reason, usage, pieces = "", None, None, 0
        try:
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    piece = choice.text if self.completes else choice.delta.content
                    if piece:
                        last = time.perf_counter()
                        first = first or last
                        text, pieces = text + piece, pieces + 1
                        yield piece
        finally:
            stream.close()
            tokens = usage.completion_tokens if usage else pieces
            self.answer = Answer(
                model=self.model,
                text=text,
                finish_reason=reason,
                prompt_tokens=usage.prompt_tokens if usage else 0,
                completion_tokens=tokens,
                seconds=round(time.perf_counter() - start, 3),
                tokens_per_second=round((tokens - 1) / (last - first), 2) if last > first and tokens > 1 else None,
            )
            if text and not self.completes:
                self.messages += [message, {"role": "assistant", "content": text}]


@contextmanager
def connected(
    target: str,
    *,
    api_key: str | None = None,
    dtype: str = "auto",
    settings: Settings | None = None,
    system: str | None = None,
    notice: Callable[[str], None] = lambda _: None,
) -> Iterator[Chat]:
    """Connect to the first model of the server at `target` (its scheme may be missing), or to that checkpoint.

    A checkpoint is served to compute in `dtype`. Raises `UsageError` for an unknown one, or one for a server;
    `ServerError` where a server cannot be reached or refuses; for a checkpoint, the errors of `serve`.
    """
    check_dtype(dtype)
    try:
        import openai  # noqa: F401
    except ModuleNotFoundError as missing:
        raise MissingExtraError("chat needs the openai client: pip install 'w8a8[serve]'") from missing

    @contextmanager
    def reach(base_url: str, key: str) -> Iterator[Chat]:
        with connect(base_url, key, max_retries=0) as client:
            with _explained(base_url):
                models = client.models.list().data
            if not models:
                raise ServerError(f"{base_url}: the server lists no model")
            yield Chat(client, models[0].id, notice, settings or Settings(), system)

    url = None if Path(target).exists() else address(target)
    if url is not None:
        if dtype != "auto":
            raise UsageError(f"--dtype {dtype}: the server at {target} has chosen already; --dtype is for a checkpoint")
        base_url = url.rstrip("/").removesuffix("/v1") + "/v1"
        with reach(base_url, api_key or "none") as chat:
            yield chat
        return
    from w8a8.checkpoint import resolve
    from w8a8.checkpoint.finding import open_headers

    folder = resolve(target).path
    headers = open_headers(folder)
    notice(f"loading {target} ...")
    from w8a8.serve.embedded.server import running

    key = secrets.token_urlsafe()
    with running(target, folder, headers=headers, api_key=key, dtype=dtype) as base_url, reach(base_url, key) as chat:
        yield chat


def data_url(path: Path) -> str:
    """Read the image in `path` as a data: URL. Raises `UsageError` if the file holds no image that a model can read."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError as missing:
        raise MissingExtraError("images need Pillow: pip install 'w8a8[serve]'") from missing
    try:
        data = read_bytes(path, MAX_IMAGE_BYTES)
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.load()
            kind = Image.MIME[str(image.format)]
        return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    except (UnreadableError, UnfitError) as error:
        raise UsageError(f"{path}: {first_line(error)}") from error
    except (UnidentifiedImageError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: not an image in {', '.join(IMAGE_FORMATS)}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn the client's errors into `ServerError`: one line, and what to do."""
    import openai

    with explained(url):
        try:
            yield
        except openai.NotFoundError as error:
            raise ServerError(f"{url}: not found ({said(error)}); is it an OpenAI-compatible server?") from error
