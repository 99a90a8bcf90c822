"""One live line for long work: how much is done, how fast, how long the rest takes.

It goes to standard error. Where that is no terminal, plain lines appear there now and then.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from w8a8.terminal.wording import clean, size

PLAIN_INTERVAL_SECONDS = 5.0
SPEED_SECONDS = 86_400
"""The speed is the average over this time: one layer may take many minutes."""

KNOWN_SHARE = 0.01
"""The share that has to be done before a line says how long the rest takes."""

BYTES = "bytes"


@dataclass
class Live:
    """The handle of a live line; call it with the amount done since the last call, from any thread."""

    advance: Callable[[int, str], None]
    _said: str = ""
    _arrived: int = 0
    _lock: Lock = field(default_factory=Lock)

    def __call__(self, done: int) -> None:
        """Add `done` to what is done."""
        self.advance(done, self._said)

    def say(self, text: str) -> None:
        """Show `text` beside the numbers from the next call on, such as the accuracy so far."""
        self._said = text

    def arrived(self, nbytes: int) -> None:
        """Show beside the numbers how many bytes have been downloaded: `nbytes` more."""
        with self._lock:
            self._arrived += nbytes
            self.say(f"{size(self._arrived)} downloaded")
        self(0)


@contextmanager
def live(what: str, total: int, *, unit: str = BYTES, quiet: bool = False) -> Iterator[Live]:
    """Show a live line for `total` bytes, or any other `unit`, for as long as the context lasts; `quiet` shows none."""
    console = Console(stderr=True, highlight=False)
    if quiet:
        yield Live(lambda _done, _said: None)
    elif console.is_terminal:
        with Progress(
            *_columns(unit), console=console, transient=True, speed_estimate_period=_speed_period(unit)
        ) as progress:
            task = progress.add_task(clean(what), total=total, said="")
            yield Live(lambda done, said: progress.update(task, advance=done, said=clean(said)))
    else:
        yield Live(_Lines(what, total, unit, console))


def _columns(unit: str) -> list[ProgressColumn]:
    counted = [DownloadColumn(), TransferSpeedColumn()] if unit == BYTES else [MofNCompleteColumn(), TextColumn(unit)]
    return [
        TextColumn("{task.description}"),
        BarColumn(),
        *counted,
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    ]


def _speed_period(unit: str) -> float:
    return 30 if unit == BYTES else SPEED_SECONDS


class _Lines:
    """A line now and then, for logs."""

    def __init__(self, what: str, total: int, unit: str, console: Console) -> None:
        self._what, self._total, self._unit, self._console = what, total, unit, console
        self._done = 0
        self._start = self._last = time.monotonic()
        self._lock = Lock()

    def __call__(self, done: int, said: str) -> None:
        with self._lock:
            self._done += done
            now = time.monotonic()
            ended = bool(said) and self._done >= self._total  # what is said is final then, such as the accuracy
            if not self._done or (now - self._last < PLAIN_INTERVAL_SECONDS and not ended):
                return
            self._last = now
            speed = self._done / (now - self._start)
            self._console.print(clean(self._line(speed, said)), soft_wrap=True)

    def _line(self, speed: float, said: str) -> str:
        known = self._done >= self._total * KNOWN_SHARE  # of what waits for a download, a header says nothing
        left = f"{(self._total - self._done) / max(speed, 1e-9):.0f} s left" if known else ""
        if self._unit == BYTES:
            share = self._done / max(self._total, 1)
            done = f"{size(self._done)} of {size(self._total)} ({share:.0%}), {speed / 1e9:.2f} GB/s"
        else:
            done = f"{self._done:,} of {self._total:,} {self._unit}"
        return f"{self._what}: {', '.join(part for part in (done, said, left) if part)}"
