"""Guard the embedded engine's app: check the key, limit a request's size and time, notice who hangs up."""

import asyncio
import secrets
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w8a8.serve.embedded.protocol import failure

MAX_BODY_BYTES = 64 * 2**20
"""Limit of a request's body: room for a few large images in base64."""

MAX_HELD_BYTES = 4 * MAX_BODY_BYTES
"""Limit of the bodies of all requests at a time."""

MAX_VALUES = 1_000_000
"""Limit of a body's JSON values: each takes a hundred times its bytes once it is read."""

BODY_SECONDS = 60.0
"""The time for a body to come."""


class Guard:
    """ASGI middleware: everything but `/health` needs the key, if there is one.

    It reads a body whole before the app sees it, and cancels the app when the client goes away. Cancelling is all that
    the handlers notice, so without it a generation would go on with nobody to read it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._may_enter(scope):
            await failure(401, "the API key is missing or wrong: send Authorization: Bearer KEY")(scope, receive, send)
            return
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    await self._read(receive, body)
            except TimeoutError:
                raise _RefusedError(408, f"the request did not come within {BODY_SECONDS:.0f} s") from None
            await self._watch(scope, bytes(body), receive, send)
        except _RefusedError as refusal:
            await failure(refusal.status, str(refusal))(scope, receive, send)
        finally:
            self._held -= len(body)

    def _may_enter(self, scope: Scope) -> bool:
        if self._expected is None or scope["path"] == "/health":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self._expected)

    async def _watch(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def replay() -> Message:
            if unread:
                return unread.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def hung_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        app = asyncio.ensure_future(self._app(scope, replay, send))
        watcher = asyncio.ensure_future(hung_up())
        try:
            await asyncio.wait({app, watcher}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watcher.cancel()
            if not app.done():
                app.cancel()
        with suppress(asyncio.CancelledError):
            await app

    async def _read(self, receive: Receive, body: bytearray) -> None:
        """Read the whole body. Raises _RefusedError for one that is too large, or that never finishes."""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise _RefusedError(400, "the request was broken off")
            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            body += chunk
            self._held += len(chunk)
            if len(body) > MAX_BODY_BYTES:
                raise _RefusedError(413, f"the request is larger than {MAX_BODY_BYTES} bytes")
            if self._held > MAX_HELD_BYTES:
                raise _RefusedError(503, "the requests that are being read are too large together; try again")
        if body.count(b",") + body.count(b"[") + body.count(b"{") > MAX_VALUES:
            raise _RefusedError(413, f"the request has more than {MAX_VALUES} values")


class _RefusedError(Exception):
    """A request that is not passed on, and the status it is answered with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
