"""Observes the requests of an HTTP application."""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from clip_server.gateway.http_messages import code_of
from clip_server.gateway.observation import (
    REQUEST_ID,
    TRACEPARENT,
    Caller,
    Observed,
    Observer,
    caller,
    join_host_port,
)

log = logging.getLogger(__name__)

_OBSERVED = "observed"


def observed_in(scope: Mapping[str, Any]) -> Observed | None:
    """The observed request that a scope describes; None: no application has it yet."""
    found: Observed | None = scope["state"].get(_OBSERVED)
    return found


class ObservedApp:
    """An ASGI application whose requests are observed, and whose failures are logged once."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name: value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"x-request-id", b"traceparent")
        }
        given = (headers.get(name.encode(), "") for name in (REQUEST_ID, TRACEPARENT))
        caller.set(Caller("http", join_host_port(scope.get("client")), *given))
        with self._observer.request(scope["path"]) as observed:
            scope["state"][_OBSERVED] = observed

            async def send_observed(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    if not observed.status:  # it was not refused meanwhile
                        observed.status = message["status"]
                        observed.code = code_of(observed.status)
                    name = (REQUEST_ID.encode(), observed.request_id.encode())
                    message["headers"] = [*message.get("headers", ()), name]
                await send(message)

            try:
                await self._app(scope, receive, send_observed)
            except Exception:
                # Starlette has answered, and raises it for whoever logs.
                log.exception("a request failed")
