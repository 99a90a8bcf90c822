"""Answers of the embedded engine as OpenAI's API spells them, whole and streamed."""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastapi import HTTPException
from transformers.cli.serving.utils import ReasoningText, ToolCall

from w8a8.serve.embedded.protocol import failure
from w8a8.serve.embedded.scoring import Scored
from w8a8.serve.embedded.spelled import spell, spell_bytes
from w8a8.serve.embedded.stream import Item, Stream


@dataclass(frozen=True)
class Spelling(ABC):
    """How one answer is spelled: its id, the model that gives it, and when it was asked for."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))
    kind: ClassVar[str]
    kind_of_chunk: ClassVar[str]

    def whole(self, items: Sequence[Item], stream: Stream) -> dict[str, Any]:
        """Spell the whole answer."""
        choice = self._scored(self._choice(items), stream)
        return {**self._head(self.kind), "choices": [self._ended(choice, items, stream)], "usage": _usage(stream)}

    async def events(self, stream: Stream, with_usage: bool) -> AsyncIterator[str]:
        """Spell the answer as it comes; an error in the middle is the API's."""
        usage = {"usage": None} if with_usage else {}
        called: list[ToolCall] = []
        told = 0
        try:
            for choice in self._opening():
                yield self._event([choice], usage)
            async for item in stream.items():
                yield self._event([self._scored(self._piece(item, len(called)), stream, told)], usage)
                told = stream.told
                if isinstance(item, ToolCall):
                    called.append(item)
            last = self._scored(self._piece(None, 0), stream, told)
            yield self._event([self._ended(last, called, stream)], usage)
            if with_usage:
                yield self._event([], {"usage": _usage(stream)})
        except HTTPException as error:
            yield f"data: {bytes(failure(error.status_code, error.detail).body).decode()}\n\n"
        finally:
            stream.cancel()
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, choices: list[Any], usage: Mapping[str, Any]) -> str:
        return f"data: {json.dumps({**self._head(self.kind_of_chunk), 'choices': choices, **usage})}\n\n"

    @staticmethod
    def _ended(choice: dict[str, Any], items: Sequence[Item], stream: Stream) -> dict[str, Any]:
        called = any(isinstance(item, ToolCall) for item in items)
        return {**choice, "finish_reason": "tool_calls" if called else stream.finish_reason}

    def _scored(self, choice: dict[str, Any], stream: Stream, begin: int = 0) -> dict[str, Any]:
        """Give a choice the scores from `begin` on, up to those of the items read so far, if they are asked for."""
        if stream.likeliest is None:
            return choice
        return {**choice, "logprobs": self._logprobs(stream, stream.scores[begin : stream.told])}

    def _opening(self) -> list[dict[str, Any]]:
        return []

    @abstractmethod
    def _logprobs(self, stream: Stream, scores: Sequence[Scored]) -> dict[str, Any] | None:
        """Spell log-probabilities."""

    @abstractmethod
    def _choice(self, items: Sequence[Item]) -> dict[str, Any]:
        """Spell all items as one choice."""

    @abstractmethod
    def _piece(self, item: Item | None, number: int) -> dict[str, Any]:
        """Spell an item of a stream; a call is the `number`th. None: no item, for the end."""


@dataclass(frozen=True)
class Completion(Spelling):
    """An answer of `/v1/completions`: a text, behind the `text` of a prompt that is echoed.

    `begins` are the characters at which that prompt's tokens begin.
    """

    kind = kind_of_chunk = "text_completion"
    text: str = ""
    begins: Sequence[int] = ()

    def _choice(self, items: Sequence[Item]) -> dict[str, Any]:
        return self._piece(self.text + "".join(map(str, items)), 0)

    def _logprobs(self, stream: Stream, scores: Sequence[Scored]) -> dict[str, Any]:
        """Spell log-probabilities; the first token of an echoed prompt has none, as nothing predicts it."""
        first = stream.prompt[:1] if stream.echo else []
        tokens = [*first, *(scored.token for scored in scores)]
        none: list[Any] = [None] * len(first)
        return {
            "tokens": [spell(stream.tokenizer, token) for token in tokens],
            "token_logprobs": none + [scored.logprob for scored in scores],
            "top_logprobs": none + [self._likeliest(stream.tokenizer, scored) for scored in scores],
            "text_offset": [*self.begins, *(len(self.text) + begin for begin in stream.begins)],
        }

    @staticmethod
    def _likeliest(tokenizer: Any, scored: Scored) -> dict[str, float]:
        """Spell the likeliest tokens and the token itself; of several that are spelled alike, the likeliest."""
        found = {spell(tokenizer, token): logprob for token, logprob in reversed(scored.likeliest)}
        return {spell(tokenizer, scored.token): scored.logprob, **found}

    def _piece(self, item: Item | None, number: int) -> dict[str, Any]:  # noqa: ARG002
        return {"index": 0, "text": item or "", "logprobs": None, "finish_reason": None}


class Chat(Spelling):
    """An answer of `/v1/chat/completions`: a message with text, reasoning and calls."""

    kind = "chat.completion"
    kind_of_chunk = "chat.completion.chunk"

    def _choice(self, items: Sequence[Item]) -> dict[str, Any]:
        calls = [item for item in items if isinstance(item, ToolCall)]
        reasoning = "".join(item for item in items if isinstance(item, ReasoningText))
        text = "".join(item for item in items if isinstance(item, str) and not isinstance(item, ReasoningText))
        message = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            **({"reasoning_content": reasoning} if reasoning else {}),
            **({"tool_calls": [self._call(call, i) for i, call in enumerate(calls)]} if calls else {}),
        }
        return {"index": 0, "message": message, "logprobs": None}

    def _logprobs(self, stream: Stream, scores: Sequence[Scored]) -> dict[str, Any] | None:
        """Spell log-probabilities of all tokens, those of reasoning, calls and the end included."""

        def spelled(token: int, logprob: float) -> dict[str, Any]:
            text, values = spell(stream.tokenizer, token), spell_bytes(stream.tokenizer, token)
            return {"token": text, "logprob": logprob, "bytes": values}

        content = [
            {**spelled(scored.token, scored.logprob), "top_logprobs": [spelled(*each) for each in scored.likeliest]}
            for scored in scores
        ]
        return {"content": content, "refusal": None} if content else None

    def _opening(self) -> list[dict[str, Any]]:
        return [self._delta({"role": "assistant", "content": ""})]

    def _piece(self, item: Item | None, number: int) -> dict[str, Any]:
        match item:
            case None:
                return self._delta({})
            case ToolCall():
                return self._delta({"tool_calls": [{"index": number, **self._call(item, number)}]})
            case ReasoningText():
                return self._delta({"reasoning_content": item})
        return self._delta({"content": item})

    @staticmethod
    def _delta(delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}

    def _call(self, call: ToolCall, number: int) -> dict[str, Any]:
        function = {"name": call.name, "arguments": call.arguments}
        return {"id": f"call-{self.id}-{number}", "type": "function", "function": function}


def _usage(stream: Stream) -> dict[str, int]:
    prompt, answer = len(stream.prompt), len(stream.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
