"""Bodies of requests, bounded in size and time, and the refusal of a request."""

import asyncio

from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException
from starlette.types import Message, Receive

SILENT_SECONDS = 30.0
_UPLOAD_SECONDS = 900.0


class Refusal(MultiPartException):
    """A request that is not answered. (gradio's reader of uploads removes what it has written on this exception.)"""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Bounded:
    """Receives a body of bounded size and time."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._left = limit_bytes
        self._until = asyncio.get_running_loop().time() + _UPLOAD_SECONDS
        self._complete = False
        self.refusal: Refusal | None = None

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            return await self._next()
        except Refusal as refusal:
            self.refusal = refusal
            raise

    async def _next(self) -> Message:
        silent = asyncio.get_running_loop().time() + SILENT_SECONDS
        try:
            async with asyncio.timeout_at(min(self._until, silent)):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, "sent too slowly") from None
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the client left before it had sent everything")
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise Refusal(413, "too large")
        self._complete = not message.get("more_body", False)
        return message


async def read_body(headers: Headers, receive: Receive, limit_bytes: int) -> bytes:
    """The whole body of a request."""
    check_length(headers, limit_bytes)
    bounded, body, more = Bounded(receive, limit_bytes), bytearray(), True
    while more:
        message = await bounded()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


def check_length(headers: Headers, limit_bytes: int) -> None:
    """Refuse what says that it is too large."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit_bytes:
        raise Refusal(413, "too large")
