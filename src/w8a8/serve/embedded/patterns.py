"""A model's response template, by which reasoning and calls are found in an answer, within bounds.

It comes with the checkpoint and holds patterns, which one hostile text may keep busy for ever. Here an answer has
`SECONDS` for all of them; beyond that a `TimeoutError` ends its parsing.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import regex
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.content_parsers import CONTENT_PARSERS
from transformers.utils.chat_parsing.response_templates import load_response_template

SECONDS = 2.0
"""The time for the patterns of an answer, its prompt included; one call's arguments have as much again."""


def response_parser(template: Any, prefix: str, tools: Sequence[Mapping[str, Any]] | None) -> ResponseParser:
    """Make the parser of an answer to the prompt `prefix`. Raises ValueError for a bad template, TimeoutError."""
    loaded, clock = load_response_template(template), _Clock()
    fields = {
        name: replace(field, open_re=_timed(field.open_re, clock), close_re=_timed(field.close_re, clock))
        for name, field in loaded.fields.items()
    }
    timed = replace(loaded, fields=fields, start_anchor_re=_timed(loaded.start_anchor_re, clock))
    return ResponseParser(timed, prefix=prefix, tools=tools)


class _Clock:
    """What is left of the time."""

    def __init__(self) -> None:
        self.left = SECONDS

    def run(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `work` with the time left as its limit."""
        if self.left <= 0:
            raise TimeoutError(f"the response template's patterns did not end within {SECONDS:.0f} s")
        begin = time.perf_counter()
        try:
            return work(*args, **kwargs, timeout=self.left)
        finally:
            self.left -= time.perf_counter() - begin


class _Timed:
    """A compiled pattern whose matching takes from a clock; it has the methods that transformers' parser calls."""

    def __init__(self, pattern: Any, clock: _Clock) -> None:
        self._pattern, self._clock = pattern, clock

    def search(self, *args: Any, **kwargs: Any) -> Any:
        return self._clock.run(self._pattern.search, *args, **kwargs)

    def finditer(self, text: str) -> Iterator[Any]:
        begin = 0
        while found := self.search(text, begin):
            yield found
            begin = max(found.end(), begin + 1)


def _timed(pattern: Any, clock: _Clock) -> _Timed | None:
    return None if pattern is None else _Timed(pattern, clock)


def _bounded(text: str, args: dict[str, Any], parse: Any = CONTENT_PARSERS["xml-inline"]) -> Any:
    """Parse a call's arguments as transformers does, once its pattern has run through the text in time."""
    if isinstance(pattern := args.get("tag_pattern"), str):
        for _ in regex.finditer(pattern, text, regex.DOTALL, timeout=SECONDS):
            pass
    return parse(text, args)


CONTENT_PARSERS["xml-inline"] = _bounded
