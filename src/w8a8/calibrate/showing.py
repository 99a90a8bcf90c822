"""A live line for work that goes on for a while: how much of it is done, and how long the rest will take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from w8a8.terminal.output import PLAIN_INTERVAL_SECONDS

SPEED_SECONDS = 86_400
"""How far back the time left is estimated from: a layer may take many minutes."""


@contextmanager
def progress(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A live line on standard error, plain ones where that is no terminal; yields `advance(number)`."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda _: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_SECONDS) as live:
            task = live.add_task(what, total=total)
            yield lambda count: live.advance(task, count)
    else:
        yield _Lines(what, total, console)


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, what: str, total: int, console: Console) -> None:
        self._what, self._total, self._console, self._done = what, total, console, 0
        self._start = self._last = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL_SECONDS:
            self._last = now
            left = (now - self._start) * (self._total - self._done) / self._done
            self._console.print(f"{self._done:,} of {self._total:,} {self._what}, {left:.0f} s left", soft_wrap=True)
