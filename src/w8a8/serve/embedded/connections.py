"""Connections to the embedded engine: how many there may be, and how long one may keep the server waiting."""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512
"""Connections at the same time; one more ends that which has waited longest without a request."""

HEAD_SECONDS = 15.0
"""The time for the head of a request, from the connection or the last answer on."""

READ_SECONDS = 60.0
"""The time for a client to take what it is sent, when it has stopped reading."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with limits, which it lacks."""

    _silent: ClassVar[dict["Connection", None]] = {}
    """The connections whose request has not come yet, the oldest first."""

    _head: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Take a connection."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > MAX_CONNECTIONS:
            next(iter(self._silent)).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._busy()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """Wait for a client that does not read."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Go on."""
        if self._reading is not None:
            self._reading.cancel()
        super().resume_writing()

    def _watch(self) -> None:
        """Give a connection without a request its time; one with a request has what time the answer takes."""
        if self.transport.is_closing() or (self.cycle is not None and not self.cycle.response_complete):
            self._busy()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
            self._silent[self] = None

    def _busy(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None
        self._silent.pop(self, None)
