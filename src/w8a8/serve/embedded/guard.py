"""Guard the embedded engine's app: check the key, limit a request's size, notice the client that hangs up."""

import asyncio
import secrets
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from w8a8.serve.embedded.protocol import failure

MAX_BODY_BYTES = 64 * 2**20
"""Limit of a request's body: room for a few large images in base64."""


class Guard:
    """ASGI middleware: everything but `/health` needs the key, if there is one.

    It reads a body whole before the app sees it, and cancels the app when the client goes away. Cancelling is all that
    the handlers notice, so without it a generation would go on with nobody to read it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not self._may_enter(scope):
            await failure(401, "the API key is missing or wrong: send Authorization: Bearer KEY")(scope, receive, send)
        elif (body := await _body(receive)) is None:
            await failure(413, f"the request is larger than {MAX_BODY_BYTES} bytes")(scope, receive, send)
        else:
            await self._watch(scope, body, receive, send)

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


async def _body(receive: Receive) -> bytes | None:
    """Read the whole body; None if it is too large or never finished."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)
