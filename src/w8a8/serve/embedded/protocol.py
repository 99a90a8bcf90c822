"""The API's requests and errors: a request to the embedded engine is checked before anything is done with it.

Every field that the engine knows has a type and a range. One that it does not know is ignored, as OpenAI and vLLM do,
unless it would change the answer: `UNSUPPORTED` lists those, and a request that asks for one is refused.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from w8a8.serve.embedded.images import open_image
from w8a8.serve.embedded.scoring import MAX_LIKELIEST

NAMES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "RequestTooLargeError"}

MAX_INTEGER = 2**31 - 1
MAX_PLAIN_CHARACTERS = 16_384
"""The longest text that a chat template may be given by name."""

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "suffix": ("",), "prompt_embeds": (), "prompt_logprobs": (),
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "logits_processors": ([],),
    "min_tokens": (0,), "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": (), "length_penalty": (1,),
    "use_beam_search": (False,), "num_beams": (1,), "no_repeat_ngram_size": (0,), "typical_p": (1,),
    "repeat_penalty": (1,), "include_stop_str_in_output": (False,), "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (), "structured_outputs": (),
    "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (), "grammar": ("",),
    "json_schema": (), "generation_config": (), "response_format": ({"type": "text"},),
}  # fmt: skip
"""Fields that would change the answer and that this engine lacks -> the values, beside null, that ask for nothing."""

UNSUPPORTED_IN_CHAT: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,), "functions": ([],), "function_call": ("none", "auto"), "audio": (), "modalities": (["text"],),
    "web_search_options": (), "chat_template": (), "add_generation_prompt": (True,),
    "continue_final_message": (False,), "add_special_tokens": (False,), "documents": ([],), "images": ([],),
    "processor_kwargs": ({},), "mm_processor_kwargs": ({},), "tokenizer_kwargs": ({},),
}  # fmt: skip


def failure(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Spell an error as the OpenAI API does."""
    kind = NAMES.get(status, "InvalidRequestError" if status < 500 else "InternalServerError")
    sayable = message.encode(errors="replace").decode()
    return JSONResponse({"error": {"message": sayable, "type": kind, "param": None, "code": status}}, status, headers)


def read(body: bytes) -> dict[str, Any]:
    """Parse a request. Raises HTTPException 400 if it is no JSON object, or has a value that no text can hold."""
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, "a string holds half of a surrogate pair, which is no character") from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return found


def _image(url: str) -> str:
    open_image(url)
    return url


def _arguments(text: str) -> str:
    try:
        json.loads(text := text.strip() or "{}")
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    return text


def _nothing_more_than_zero(temperature: float) -> float:
    if 0 < temperature < 1e-6:
        raise ValueError("is too small to divide by: 0 takes the likeliest token, else 0.000001 is the least")
    return temperature


def _unlist(prompt: Any) -> Any:
    only = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else None
    return only if isinstance(only, str | list) else prompt


def _not_supported(value: Any) -> Any:
    if value is not None:
        raise ValueError("is not supported by this engine")
    return value


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Plain = (
    Annotated[str, StringConstraints(max_length=MAX_PLAIN_CHARACTERS)]
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    | float
    | bool
    | None
)
"""A value that a chat template may be given by name."""

Token = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
"""A token's number in the vocabulary."""

Nothing = Annotated[Any, AfterValidator(_not_supported)]


class _StreamOptions(_Fields):
    include_usage: bool | None = None


class Request(_Fields):
    """The fields of both endpoints; `top_k` to `ignore_eos` as in vLLM."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_nothing_more_than_zero)] | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    top_k: int | None = Field(None, ge=-1, le=MAX_INTEGER)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> Self:
        """Check `body`. Raises HTTPException 400 that names a field at fault."""
        for name, harmless in cls.unsupported.items():
            if body.get(name) is not None and body[name] not in harmless:
                raise HTTPException(400, f"{name}: is not supported by this engine (vLLM may do it)")
        try:
            return cls.model_validate(body)
        except ValidationError as error:
            # Every branch of a union complains; the one that got furthest is the one that was meant.
            deepest = max(error.errors(include_url=False, include_input=False), key=lambda e: len(e["loc"]))
            where = ".".join(str(part) for part in deepest["loc"] if "[" not in str(part))
            message = deepest["msg"].removeprefix("Value error, ")
            raise HTTPException(400, f"{where}: {message}" if where else message) from None

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_tokens

    @property
    @abstractmethod
    def likeliest(self) -> int | None:
        """The likeliest tokens that are told beside each token and its log-probability; None: nothing is told."""

    @property
    def with_usage(self) -> bool:
        """Whether a stream should end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **UNSUPPORTED,
        "add_special_tokens": (True,),
    }

    prompt: Annotated[str | list[Token], BeforeValidator(_unlist)]
    max_tokens: int | None = Field(None, ge=0, le=MAX_INTEGER)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LIKELIEST)

    @model_validator(mode="after")
    def _scored_whole(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1, or with echo 0")
        if self.stream and (self.echo or self.logprobs is not None):
            raise ValueError("stream: with echo or logprobs this engine answers whole (vLLM may do it)")
        return self

    @property
    def likeliest(self) -> int | None:
        """The likeliest tokens that are told beside each token and its log-probability; None: nothing is told."""
        return self.logprobs


class _Text(_Fields):
    type: Literal["text"]
    text: str


class _ImageUrl(_Fields):
    url: Annotated[str, AfterValidator(_image)]


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

    def for_template(self) -> dict[str, Any]:
        """Spell it as chat templates read it: with its arguments as an object."""
        function = {"name": self.function.name, "arguments": json.loads(self.function.arguments)}
        return {**({"id": self.id} if self.id else {}), "type": self.type, "function": function}


class Message(_Fields):
    """A message; what answers carry besides, such as `refusal` and `annotations`, is ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[_Text | _ImagePart, Field(discriminator="type")]] | None = None
    name: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    audio: Nothing = None
    function_call: Nothing = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: a message of the {self.role} must have some")
        return self

    @property
    def images(self) -> list[str]:
        """The `data:` URLs of its images."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, _ImagePart)]

    def for_template(self, *, sees: bool) -> dict[str, Any]:
        """Spell it as chat templates read it: a list of parts for a model that `sees` images, else a text."""
        content = [_Text(type="text", text=self.content)] if isinstance(self.content, str) else self.content or []
        parts = [
            {"type": "text", "text": part.text} if isinstance(part, _Text) else {"type": "image"} for part in content
        ]
        told = {
            "role": "system" if self.role == "developer" else self.role,
            "content": parts if sees else " ".join(part["text"] for part in parts),
            "name": self.name,
            "tool_calls": [call.for_template() for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        return {name: value for name, value in told.items() if value is not None}


def _tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in tools:
        function = tool.get("function")
        if (
            tool.get("type") != "function"
            or not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
        ):
            raise ValueError("every tool must be of the type function, and name its function")
    return tools


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {**UNSUPPORTED, **UNSUPPORTED_IN_CHAT}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INTEGER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LIKELIEST)
    tools: Annotated[list[dict[str, Any]], AfterValidator(_tools)] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Plain = None
    chat_template_kwargs: Annotated[dict[str, Plain], Field(max_length=64)] | None = None

    @model_validator(mode="after")
    def _tools_as_wanted(self) -> Self:
        if self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice: this engine supports auto and none (vLLM may do more)")
        if self.tools and self.parallel_tool_calls is False:
            raise ValueError("parallel_tool_calls: false is not supported by this engine (vLLM may do it)")
        return self

    @model_validator(mode="after")
    def _scored_to_be_told(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likeliest(self) -> int | None:
        """The likeliest tokens that are told beside each token and its log-probability; None: nothing is told."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return (self.tools or None) if self.tool_choice != "none" else None

    @property
    def images(self) -> list[str]:
        """The `data:` URLs of all images."""
        return [url for message in self.messages for url in message.images]
