"""What stands before the embedded engine's app: the key, the size of a request, and the client that hangs up."""

import asyncio
import secrets
from contextlib import suppress

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 64 * 2**20
"""Of one request: a few large images, base64 included."""

NAMES = {400: "BadRequestError", 401: "AuthenticationError", 404: "NotFoundError", 413: "RequestTooLargeError"}


def failure(status: int, message: str) -> JSONResponse:
    """An error as the OpenAI API spells one."""
    kind = NAMES.get(status, "InvalidRequestError" if status < 500 else "InternalServerError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


class Guard:
    """ASGI middleware. Everything but `/health` needs the key, if there is one.

    A body is read whole before the app sees it, and the app is cancelled when the client goes away; the handlers notice
    only that, and only so does a generation end with nobody to read it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
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
    """The whole body, or None for one too large or never finished."""
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
