"""Compresses the responses of an HTTP application."""

from __future__ import annotations

import asyncio
import re
import zlib

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clip_server.gateway.compression import FAST_RESPONSE, GZIP, LEVEL

# Responses with fewer bytes are not compressed.
_SMALLEST_RESPONSE = 1024
# With this parameter of `Accept-Encoding` a client excludes an encoding.
_NO_WEIGHT = re.compile(r"q\s*=\s*0(\.0*)?")


class CompressingApp:
    """ASGI middleware that compresses responses with gzip for clients that accept it: large ones in
    a thread, so that other requests do not wait."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}

        async def send_compressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)  # sent with the body, which says how long it is
                return
            if start:
                await _compress(start, message, Headers(scope=scope))
                await send({**start})
                start.clear()
            await send(message)

        await self._app(scope, receive, send_compressed)


async def _compress(start: Message, body: Message, request: Headers) -> None:
    """Compresses a response in place, if it is large and its client accepts it."""
    headers = MutableHeaders(raw=start["headers"])
    is_whole = not body.get("more_body", False)
    content: bytes = body.get("body", b"")
    if not is_whole or len(content) < _SMALLEST_RESPONSE or "content-encoding" in headers:
        return
    headers.add_vary_header("Accept-Encoding")
    if not _accepts_gzip(request.get("accept-encoding", "")):
        return
    is_fast = len(content) <= FAST_RESPONSE
    packed = _gzip(content) if is_fast else await asyncio.to_thread(_gzip, content)
    headers.update({"Content-Encoding": "gzip", "Content-Length": str(len(packed))})
    body["body"] = packed


def _accepts_gzip(accepted: str) -> bool:
    """Whether gzip is among the encodings of a header `Accept-Encoding`, and not excluded."""
    for each in accepted.lower().split(","):
        name, *parameters = (part.strip() for part in each.split(";"))
        if name in ("gzip", "x-gzip"):
            return not any(_NO_WEIGHT.fullmatch(parameter) for parameter in parameters)
    return False


def _gzip(content: bytes) -> bytes:
    packer = zlib.compressobj(LEVEL, wbits=GZIP)
    return packer.compress(content) + packer.flush()
