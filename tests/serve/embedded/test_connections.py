"""A connection whose client has stopped reading, which a real socket's buffers would hide for megabytes."""

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from w8a8.serve.embedded import connections
from w8a8.serve.embedded.connections import Connection


class Transport:
    """A transport that notes its end."""

    aborted = False

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted

    def get_extra_info(self, name: str) -> Any:
        return None


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_client_that_stops_reading_is_cut_off(monkeypatch: pytest.MonkeyPatch, *, goes_on: bool) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.05)

    async def stop_reading() -> bool:
        config = uvicorn.Config(lambda *_: None, ws="none")
        config.load()
        transport = Transport()
        connection = Connection(config, ServerState(), {})
        connection.connection_made(transport)
        connection.pause_writing()
        if goes_on:
            connection.resume_writing()
        await asyncio.sleep(0.2)
        aborted = transport.aborted
        connection.connection_lost(ConnectionError())
        return aborted

    assert asyncio.run(stop_reading()) is not goes_on
