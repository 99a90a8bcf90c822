"""The API's requests and errors: a request to the embedded engine is checked before transformers' handlers see it.

They take the fields they know out of the JSON unchecked: a string where a number belongs is their 500, an option they
do not have is ignored, and an image may be any URL or any file of this machine. Here every field has a type and a
range, a request that cannot be answered is refused, and an image comes inside the request.
"""

import base64
import json
import warnings
from collections.abc import Mapping
from io import BytesIO
from typing import Annotated, Any, Literal, Self

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

MAX_IMAGE_PIXELS = 50_000_000
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


NAMES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "RequestTooLargeError"}


def failure(status: int, message: str) -> JSONResponse:
    """Spell an error as the OpenAI API does."""
    kind = NAMES.get(status, "InvalidRequestError" if status < 500 else "InternalServerError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def _only(allowed: Any = None) -> Any:
    """A field that this engine does not support: it accepts null, and the one value that asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value != allowed:
            raise ValueError("is not supported by this engine (vLLM may do it)")
        return value

    return Annotated[Any, AfterValidator(check)]


def open_image(url: str) -> Image.Image:
    """Decode the image in a `data:` URL. Raises ValueError if Pillow cannot read it, or if it is too large."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("must be a data:image/...;base64, URL; this server fetches nothing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=IMAGE_FORMATS)
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS:,}")
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"is not a readable image ({', '.join(IMAGE_FORMATS)})") from error
    return image


def _image(url: str) -> str:
    open_image(url)
    return url


def _arguments(text: str) -> str:
    json.loads(text)
    return text


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Request(_Fields):
    """The fields of both endpoints; `top_k` to `ignore_eos` as in vLLM."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0)
    ignore_eos: bool | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """Check `body`. Raises HTTPException 400 that names a field at fault."""
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            # Every branch of a union complains; the one that got furthest is the one that was meant.
            deepest = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
            where = ".".join(map(str, deepest["loc"]))
            message = deepest["msg"].removeprefix("Value error, ")
            raise HTTPException(400, f"{where}: {message}") from None

    n: _only(allowed=1) = None  # type: ignore[valid-type]
    presence_penalty: _only(allowed=0) = None  # type: ignore[valid-type]
    frequency_penalty: _only(allowed=0) = None  # type: ignore[valid-type]
    logit_bias: _only(allowed={}) = None  # type: ignore[valid-type]


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    prompt: str
    best_of: _only(allowed=1) = None  # type: ignore[valid-type]
    echo: _only(allowed=False) = None  # type: ignore[valid-type]
    logprobs: _only() = None  # type: ignore[valid-type]
    suffix: _only() = None  # type: ignore[valid-type]


class _Text(_Fields):
    type: Literal["text"]
    text: str


class _ImageUrl(_Fields):
    url: Annotated[str, AfterValidator(_image)]
    detail: str | None = None


class _ImagePart(_Fields):
    type: Literal["image_url"]
    image_url: _ImageUrl


class _Function(_Fields):
    name: str
    arguments: Annotated[str, AfterValidator(_arguments)]


class _ToolCall(_Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Fields):
    role: str
    content: str | list[Annotated[_Text | _ImagePart, Field(discriminator="type")]] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    tool_choice: _only(allowed="auto") = None  # type: ignore[valid-type]
    parallel_tool_calls: _only(allowed=True) = None  # type: ignore[valid-type]
    response_format: _only(allowed={"type": "text"}) = None  # type: ignore[valid-type]
    logprobs: _only(allowed=False) = None  # type: ignore[valid-type]
    top_logprobs: _only(allowed=0) = None  # type: ignore[valid-type]

    @property
    def has_images(self) -> bool:
        """Whether any message holds an image."""
        return any(isinstance(p, _ImagePart) for m in self.messages if isinstance(m.content, list) for p in m.content)
