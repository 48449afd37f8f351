"""Refuses HTTP requests before their bodies are read, where requests like them would be refused.

Reading and parsing a body costs several times what an answer of status 429 does, and a server that
is full has no time for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from clip_server.errors import RequestError
from clip_server.gateway.admission import Backlog, Work
from clip_server.gateway.http_messages import refuse

# Kinds of requests to remember.
_MOST_KINDS = 1024
_noting: ContextVar[Callable[[Backlog, Work], None]] = ContextVar(
    "noting", default=lambda _, __: None
)


def note_work(backlog: Backlog, work: Work) -> None:
    """Notes what the HTTP request that is being answered turned out to be, if it is one."""
    _noting.get()(backlog, work)


class EarlyRefusal:
    """ASGI middleware that refuses a request if the last one like it would be refused.

    Requests are alike if they go to the same path, and their bodies are about as long and encoded
    alike.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._seen: dict[tuple[str, int, bytes], tuple[Backlog, Work]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            await self._app(scope, receive, send)
            return
        encoding = headers.get(b"content-encoding", b"")
        kind = scope["path"], int(length).bit_length(), encoding
        try:
            if kind in self._seen:
                backlog, work = self._seen[kind]
                backlog.refuse_if_late(work)
        except RequestError as error:
            response = await refuse(Request(scope), error)
            await response(scope, receive, send)
            return

        def note(backlog: Backlog, work: Work) -> None:
            if len(self._seen) < _MOST_KINDS or kind in self._seen:
                self._seen[kind] = backlog, work

        _noting.set(note)
        await self._app(scope, receive, send)
