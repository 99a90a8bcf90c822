"""One live line for long work: what is done and what passes beside it, how fast, how long the rest takes.

It goes to standard error. Where that is no terminal, plain lines appear there now and then; for machines, JSON.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from w8a8.terminal.events import event
from w8a8.terminal.output import Terminal
from w8a8.terminal.wording import clean, duration, printable, size

PLAIN_INTERVAL_SECONDS = 5.0
JSON_INTERVAL_SECONDS = 1.0

RECENT_SECONDS = 30.0
"""The speed is the average over this time,"""
RECENT_STEPS = 10
"""but over so many steps at least: one layer may take many minutes."""
STEP_SECONDS = 0.25

KNOWN_SHARE = 0.01
"""The share that has to be done before a line says how long the rest takes."""

BYTES = "bytes"


@dataclass(slots=True)
class Lane:
    """A stream of bytes, or of any other unit: how much of it has passed, of how much where that is known."""

    name: str
    total: int | None
    done: int = 0
    _seen: deque[tuple[float, int]] = field(default_factory=lambda: deque([(time.monotonic(), 0)]))

    def add(self, amount: int, now: float) -> None:
        """Let `amount` more pass."""
        self.done += amount
        if now - self._seen[-1][0] >= STEP_SECONDS:
            self._seen.append((now, self.done))
            while len(self._seen) > RECENT_STEPS and now - self._seen[0][0] > RECENT_SECONDS:
                self._seen.popleft()

    def rate(self, now: float) -> float:
        """How much has passed per second lately."""
        then, done = self._seen[0]
        return max(self.done - done, 0) / max(now - then, 1e-9)

    def left(self, now: float) -> float | None:
        """How many seconds the rest takes, where that is known; of what waits for a download, a header says nothing."""
        rate = self.rate(now)
        if self.total is None or not rate or self.done < self.total * KNOWN_SHARE:
            return None
        return max(self.total - self.done, 0) / rate


class Live:
    """The handle of a live line; call it with the amount done since the last call, from any thread."""

    def __init__(
        self, what: str, total: int, unit: str, show: Callable[["Live", float], None], interval: float
    ) -> None:
        """`show` is given this and the time now, at most every `interval` seconds."""
        self.what, self.unit, self.said = what, unit, ""
        self.main = Lane(what, total)
        self.beside: list[Lane] = []
        self.ending: dict[str, Any] = {}  # what the last event has besides, as plain JSON
        self._show, self._interval = show, interval
        self._shown = time.monotonic()
        self._lock = Lock()

    def __call__(self, done: int) -> None:
        """Add `done` to what is done."""
        self._pass(self.main, done)

    def say(self, text: str) -> None:
        """Show `text` beside the numbers from the next call on, such as the accuracy so far."""
        self.said = text

    def lane(self, name: str, total: int | None = None) -> Callable[[int], None]:
        """Show what passes beside the main work, such as bytes "downloaded"; call what is returned with more of it."""
        lane = Lane(name, total)
        self.beside.append(lane)
        return partial(self._pass, lane)

    def left(self, now: float) -> float | None:
        """How many seconds the slowest of all takes; None where none is known."""
        return max((left for lane in (self.main, *self.beside) if (left := lane.left(now)) is not None), default=None)

    def text(self, now: float) -> str:
        """The numbers as people read them."""
        main, total = self.main, self.main.total or 0
        if self.unit == BYTES:
            done = f"{_of(main)} ({main.done / max(total, 1):.0%}), {size(main.rate(now))}/s"
        else:
            done = f"{main.done:,} of {total:,} {self.unit}"
        beside = [f"{_of(lane)} {lane.name}" for lane in self.beside if lane.done]
        left = self.left(now)
        rest = [f"{duration(left)} left"] if left else []
        return ", ".join(filter(None, [done, *rest, *beside, self.said]))

    def numbers(self, now: float) -> dict[str, Any]:
        """The same as plain JSON."""
        left = self.left(now)
        beside = {lane.name: _numbers(lane, now) for lane in self.beside if lane.done}
        eta = None if left is None else round(left, 1)
        said = {"said": self.said} if self.said else {}
        return {"what": self.what, "unit": self.unit, **_numbers(self.main, now), "eta": eta, **beside, **said}

    def _pass(self, lane: Lane, amount: int) -> None:
        with self._lock:
            now = time.monotonic()
            lane.add(amount, now)
            final = bool(self.said) and self.main.done >= (self.main.total or 0)  # such as the accuracy
            if amount and (now - self._shown >= self._interval or final):
                self._shown = now
                self._show(self, now)


@contextmanager
def live(terminal: Terminal, what: str, total: int, *, unit: str = BYTES) -> Iterator[Live]:
    """Show a live line for `total` bytes, or any other `unit`, for as long as the context lasts."""
    console = Console(stderr=True, highlight=False)
    if terminal.quiet:
        yield Live(what, total, unit, lambda _line, _now: None, PLAIN_INTERVAL_SECONDS)
    elif terminal.log_json:
        began = time.monotonic()
        line = Live(what, total, unit, lambda line, now: event("progress", **line.numbers(now)), JSON_INTERVAL_SECONDS)
        event("begin", what=what, unit=unit, total=total)
        yield line
        now = time.monotonic()
        event("end", seconds=round(now - began, 3), **line.numbers(now), **line.ending)
    elif console.is_terminal:
        named = TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len(clean(what))))
        columns = (named, BarColumn(bar_width=None))
        with Progress(*columns, console=console, transient=True, expand=True) as progress:
            task = progress.add_task(clean(what), total=total)
            line = Live(what, total, unit, lambda line, _now: progress.update(task, completed=line.main.done), 0.0)
            progress.columns = (*progress.columns, _Numbers(line))
            yield line
    else:

        def show(line: Live, now: float) -> None:
            console.print(clean(f"{what}: {line.text(now)}"), soft_wrap=True)

        yield Live(what, total, unit, show, PLAIN_INTERVAL_SECONDS)


class _Numbers(ProgressColumn):
    """The numbers beside the bar, which change with the time, too."""

    max_refresh = 0.5

    def __init__(self, line: Live) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))  # the bar has what they leave of the line
        self._line = line

    def render(self, _task: Task) -> Text:
        return Text(printable(self._line.text(time.monotonic())))


def _of(lane: Lane) -> str:
    return size(lane.done) + (f" of {size(lane.total)}" if lane.total is not None else "")


def _numbers(lane: Lane, now: float) -> dict[str, Any]:
    return {"done": lane.done, "total": lane.total, "rate": round(lane.rate(now), 3)}
