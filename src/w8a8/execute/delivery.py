"""Where finished files go besides the staging folder: nowhere, or a repository, or a store, while later ones are made.

A `Delivery` sends one shard at a time and says what it still has; the `Outbox` does so in the background, and holds the
making of shards back where they would fill the disk.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from w8a8.checkpoint.stream import Stopped
from w8a8.execute.shard import ShardRecord

SENDERS = 2
"""Shards on their way at once."""
WAITING = 2
"""Shards that may be on the disk beyond those being made, where shards depart."""
POLL_SECONDS = 0.2
"""How often one who waits looks whether the run was stopped."""
ENDING_SECONDS = 5.0
"""How long the end of a run waits for what is on its way to notice."""


class Delivery(Protocol):
    """A place that the result is sent to. All methods raise errors of `w8a8.errors`."""

    @property
    def departs(self) -> bool:
        """Whether a shard leaves the disk once it was sent. If so no OUT is made here."""

    def held(self, shards: Sequence[ShardRecord]) -> Set[str]:
        """The names of those shards that are at this place still. Their receipts are of this place, or of another.

        Asked when a run begins, of what earlier runs have sent: whatever is not held is sent again.
        """

    def send(self, path: Path, shard: ShardRecord, stopped: Callable[[], bool]) -> str:
        """Send the finished shard at `path`, and return a receipt once it is safe at this place.

        The journal keeps the receipt, and later calls find it in `shard.receipt`; it must not be "". What the place has
        already need not be sent. Several threads call this. Ends early once `stopped()` holds, and raises `Stopped`.
        """

    def finish(self, folder: Path, shards: Sequence[ShardRecord]) -> None:
        """Send all other files of `folder`, and make the whole visible at once.

        Of shards that departed, the folder has files of their length with nothing behind the header. Raises where a
        shard is not at this place any more, or not what was sent. A run that ended behind this calls it again.
        """


class _Here:
    """Nothing is sent: the result stays where it is made."""

    @property
    def departs(self) -> bool:
        """No."""
        return False

    def held(self, _shards: Sequence[ShardRecord]) -> Set[str]:
        """Nothing was sent here."""
        return frozenset()

    def send(self, _path: Path, _shard: ShardRecord, _stopped: Callable[[], bool]) -> str:
        """There is nothing to do."""
        return ""

    def finish(self, _folder: Path, _shards: Sequence[ShardRecord]) -> None:
        """There is nothing to do."""


HERE = _Here()


class Outbox:
    """The finished shards of `folder` that are to be sent, and the threads that do."""

    def __init__(self, delivery: Delivery, folder: Path, workers: int, sent: Callable[[ShardRecord], None]) -> None:
        """`sent` is told of each shard that was sent, with its receipt, one at a time.

        `limit` is the number of shards that are on the disk at once; None where all stay.
        """
        self.limit = workers + WAITING if delivery.departs else None
        self._delivery, self._folder, self._sent = delivery, folder, sent
        self._changed = threading.Condition()
        self._waiting: deque[ShardRecord] = deque()
        self._here: set[str] = set()
        self._error: BaseException | None = None
        self._ended = threading.Event()  # nothing more is to be sent
        self._closed = False  # nothing more may be noted

    def admit(self, name: str, stopped: Callable[[], bool]) -> None:
        """Wait until there is room for another shard, where shards depart. Raises `Stopped`."""
        with self._changed:
            while self.limit and len(self._here) >= self.limit and not (self._ended.is_set() or stopped()):
                self._changed.wait(POLL_SECONDS)
            if self._ended.is_set() or stopped():
                raise Stopped
            self._here.add(name)

    def put(self, shard: ShardRecord) -> None:
        """Have a finished shard sent."""
        with self._changed:
            self._here.add(shard.name)
            self._waiting.append(shard)
            self._changed.notify_all()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Send what is put in while the context lasts; its end waits until all is sent. Raises what `send` raises."""
        threads = [threading.Thread(target=self._run, name=f"send {n}", daemon=True) for n in range(SENDERS)]
        for thread in threads:
            thread.start()
        try:
            yield
            with self._changed:
                while self._here and not self._ended.is_set():
                    self._changed.wait(POLL_SECONDS)
        except Stopped:
            if self._error is None:
                raise
        finally:
            with self._changed:
                self._ended.set()
                self._changed.notify_all()
            for thread in threads:
                thread.join(ENDING_SECONDS)
            with self._changed:
                self._closed = True
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                receipt = self._delivery.send(self._folder / shard.name, shard, self._ended.is_set)
                with self._changed:
                    if self._closed:
                        return
                    if receipt:
                        self._sent(replace(shard, receipt=receipt))
                    self._here.discard(shard.name)
                    self._changed.notify_all()
            except BaseException as error:  # noqa: BLE001 - handed to the run, which raises it
                with self._changed:
                    if not self._ended.is_set():
                        self._error = error
                        self._ended.set()
                        self._changed.notify_all()
                return

    def _next(self) -> ShardRecord | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended.is_set())
            return None if self._ended.is_set() else self._waiting.popleft()
