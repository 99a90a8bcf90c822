"""The layers that a config's `exclude` or `ignore` names, or matches by `re:`, as vLLM and transformers read it.

The patterns are anyone's, so they run with a bound on their time: `re` may search for years, where
`regex`, which reads the same language, can be told to stop.
"""

import math
import re
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from w8a8.errors import NoConfigError
from w8a8.reading import show

MAX_PATTERNS, MAX_LENGTH, MAX_REPEATS = 1000, 1000, 10_000
"""Patterns of a list that are used, characters of one, and how often its counted repetitions may make it run."""

SECONDS, SECONDS_EACH = 0.5, 20e-6
"""Processor time for all matches together, and for each on top; a usual one takes a few microseconds."""


class Excludes:
    """The entries of one list."""

    def __init__(self, entries: Sequence[str]) -> None:
        self._names = frozenset(entry for entry in entries if not entry.startswith("re:"))
        self._entries = [entry for entry in dict.fromkeys(entries) if entry.startswith("re:")]
        self._spent, self._allowed = 0.0, SECONDS

    def mean(self, module: str) -> bool:
        """Whether an entry is the name of `module`, or a pattern that matches it from the start.

        Raises `NoConfigError` for a pattern that does not come to an end.
        """
        return module in self._names or any(self._matches(entry, module) for entry in self._patterns)

    @property
    def unusable(self) -> tuple[str, ...]:
        """Patterns that no engine can use, or that are beyond all measure; they match nothing here."""
        return tuple(entry for entry in self._entries if entry not in self._patterns)

    @cached_property
    def _patterns(self) -> dict[str, Any]:
        return {entry: found for entry in self._entries[:MAX_PATTERNS] if (found := _compiled(entry[3:]))}

    def _matches(self, entry: str, module: str) -> bool:
        started = time.thread_time()
        try:
            found = self._patterns[entry].match(module, timeout=SECONDS) is not None
        except TimeoutError:
            found, self._allowed = False, 0.0
        self._spent += time.thread_time() - started
        self._allowed += SECONDS_EACH
        if self._spent > self._allowed:
            raise NoConfigError(
                f"config.json: matching {show(entry)} with the name of {show(module)} does not come to an end, nor "
                "would it in an engine; mend the list of layers that quantization ignores"
            )
        return found


def _compiled(pattern: str) -> Any:
    """The compiled pattern, None where it cannot be."""
    import regex

    repeats = math.prod(
        max(1, *map(int, re.findall(r"\d{1,9}", counts))) for counts in re.findall(r"\{(.*?\d.*?)\}", pattern)
    )
    if len(pattern) > MAX_LENGTH or repeats > MAX_REPEATS:
        return None
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError):
        return None
