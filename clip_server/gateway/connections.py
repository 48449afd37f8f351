"""Bounds on connections: how many there may be, how slowly they may send, how old they may grow."""

from __future__ import annotations

import asyncio
import json
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clip_server.errors import RequestError
from clip_server.gateway.http_messages import json_error, own_error, retry_headers, status_of
from clip_server.gateway.observation import (
    REQUEST_ID,
    Caller,
    Observed,
    Observer,
    caller,
    join_host_port,
)
from clip_server.gateway.observed_app import ObservedApp, observed_in
from clip_server.launch.gateway_group import SharedCounts

# Of a request's line and headers.
_MOST_HEAD_BYTES = 64 << 10
# A body or message that comes at this rate, or faster, is never too slow. Bytes a second.
SLOWEST_BODY = 16 << 10
# A connection beyond the limit has this long to send a request, and learn why it is closed.
_BEYOND_LIMIT_SECONDS = 1.0
# The names of their number, and of that of the bytes that they are receiving.
_ALL, _RECEIVED = "connections", "bytes being received"
# When the client of one may try again.
_RETRY_SECONDS = 1.0
_CLOSE = (b"connection", b"close")
_LARGE_HEAD = f"the headers are larger than {_MOST_HEAD_BYTES >> 10} KiB, the most the server takes"


@dataclass(frozen=True)
class ConnectionBounds:
    """Keys of a flow's `with:`.

    max_connections, max_connections_per_address: of HTTP and WebSocket together, and of gRPC.
    header_timeout: seconds in which the headers of a request, or the handshake of a connection,
        must have come; 0: any time.
    body_timeout: seconds in which the body of an HTTP request or a message over WebSocket must
        have come, apart from the time that it takes at 16 KiB a second; a response over HTTP that
        is read more slowly is given up. The message of a unary gRPC call has this time and that
        of the largest one at 4 MiB a second. 0: any time.
    max_connection_age: seconds after which a connection is closed between two requests, so that
        its client connects anew, perhaps to another server; 0: never.
    """

    max_connections: int = 4096
    max_connections_per_address: int = 2048
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    max_connection_age: float = 0.0

    def draw_age(self) -> float | None:
        """The age that one connection may reach: a tenth more or less, so that those opened
        together are not closed together. None: any."""
        return self.max_connection_age * random.uniform(0.9, 1.1) or None


class Connections:
    """Counts the open connections of all ports, by the addresses of their clients, and what they
    are receiving.

    counts: those of other gateways are added to.
    max_received_bytes: of HTTP bodies and WebSocket messages whose end has not come yet.
    """

    def __init__(
        self, bounds: ConnectionBounds, counts: SharedCounts, max_received_bytes: int = 1 << 30
    ) -> None:
        self.bounds, self.counts = bounds, counts
        self._most_received = max_received_bytes

    def add(self, address: str) -> RequestError | None:
        """Counts a connection. Returns why it is one too many; None: it is not."""
        of_address = self._count(address, 1)
        bounds = self.bounds
        if self.counts.total(of_address) > bounds.max_connections_per_address:
            return too_many_of_address(bounds.max_connections_per_address)
        if self.counts.total(_ALL) > bounds.max_connections:
            return _too_many(f"{bounds.max_connections:,} connections (max_connections)")
        return None

    def remove(self, address: str) -> None:
        """Counts a connection as closed."""
        self._count(address, -1)

    def receive(self, count: int, of_connection: int) -> RequestError | None:
        """Counts bytes of a request whose end has not come yet, or, below 0, of one that has ended.
        Returns why they are too many; None: they are not.

        of_connection: all of that request. One that is larger than the bound is taken by an idle
            server.
        """
        self.counts.add(_RECEIVED, count)
        received = self.counts.total(_RECEIVED)
        if count <= 0 or received <= self._most_received or received == of_connection:
            return None
        most = f"{self._most_received / 2**20:,.0f} MiB of requests that have not come whole"
        return _too_many(f"{most} (max_queued_bytes)", "RESOURCE_EXHAUSTED")

    def _count(self, address: str, number: int) -> str:
        """Adds a number of connections of an address. Returns the name of their number."""
        of_address = f"{_ALL} of {address}"
        self.counts.add(of_address, number)
        self.counts.add(_ALL, number)
        return of_address


def too_many_of_address(most: int) -> RequestError:
    """Why a connection of an address that has `most` is refused."""
    bound = f"{most:,} connections from one address (max_connections_per_address)"
    return _too_many(bound, "RESOURCE_EXHAUSTED")


def _too_many(bound: str, code: str = "UNAVAILABLE") -> RequestError:
    message = f"the server takes at most {bound}; try again in a moment"
    return RequestError(message, code, retry_after=_RETRY_SECONDS)


async def _refuse_large_head(scope: Scope, receive: Receive, send: Send) -> None:
    response = json_error(
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "INVALID_ARGUMENT", _LARGE_HEAD
    )
    response.headers["Connection"] = "close"
    await response(scope, receive, send)


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on connections and on the size and time of requests.

    observer: observes the requests that are refused here, before an application gets them.
    """

    def __init__(self, connections: Connections, observer: Observer, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all, self._observer = connections, observer
        self._refuse_large_head = ObservedApp(_refuse_large_head, observer)
        self._bounds = connections.bounds
        self._address = ""
        self._beyond_limit: RequestError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.TimerHandle | None = None
        # What came since the last part of a body, or the end of a request.
        self._head_bytes = 0
        self._field_bytes = self._body_bytes = 0
        # Of a body whose end has not come yet.
        self._held_bytes = 0
        self._too_old = float("inf")
        self._lost: asyncio.Future[None] = self.loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._beyond_limit = self._all.add(self._address)
        if age := self._bounds.draw_age():
            self._too_old = self.loop.time() + age
        seconds = _BEYOND_LIMIT_SECONDS if self._beyond_limit else self._bounds.header_timeout
        self._expect(seconds, self._refuse_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost.set_result(None)
        self._expect_nothing()
        self._expect_no_reading()
        self._hold(0)
        self._all.remove(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._beyond_limit:
            self._refuse(status_of(self._beyond_limit.code), self._beyond_limit)
            return
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MOST_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, RequestError(_LARGE_HEAD))

    def send_400_response(self, msg: str) -> None:
        del msg
        if self._head_bytes <= _MOST_HEAD_BYTES:  # else that is why it cannot be read
            self._refuse(HTTPStatus.BAD_REQUEST, RequestError("the request is not valid HTTP/1.1"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["connection_lost"] = self._lost
        self._field_bytes = 0
        self._expect(self._bounds.header_timeout, self._refuse_slow_head)

    def on_url(self, url: bytes) -> None:
        self._field_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        # They may have come at once, with their end.
        is_large = self._field_bytes > _MOST_HEAD_BYTES
        self.app = self._refuse_large_head if is_large else self.config.loaded_app
        super().on_headers_complete()
        self._body_bytes = 0
        self._expect(self._bounds.body_timeout, self._refuse_slow_body)
        if self.loop.time() > self._too_old and self.cycle is not None:
            self.cycle.default_headers = [*self.cycle.default_headers, _CLOSE]

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        self._body_bytes += len(body)
        if refusal := self._hold(self._held_bytes + len(body)):
            self._refuse(status_of(refusal.code), refusal)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._expect_nothing()
        self._hold(0)
        super().on_message_complete()

    def _hold(self, count: int) -> RequestError | None:
        """Counts bytes of a body whose end has not come yet. Returns why they are too many."""
        more, self._held_bytes = count - self._held_bytes, count
        return self._all.receive(more, count)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        self._expect_no_reading()
        super().resume_writing()

    def _expect_reading(self) -> None:
        """Closes the connection if its client does not read the response fast enough."""
        seconds, unread = self._bounds.body_timeout, self.transport.get_write_buffer_size()

        def look() -> None:
            if unread - self.transport.get_write_buffer_size() < seconds * SLOWEST_BODY:
                self.transport.abort()
            else:
                self._expect_reading()

        if seconds:
            self._reading = self.loop.call_later(seconds, look)

    def _expect_no_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def _expect(self, seconds: float, otherwise: Any) -> None:
        self._expect_nothing()
        if seconds:
            self._timer = self.loop.call_later(seconds, otherwise)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse_slow_head(self) -> None:
        if self._head_bytes and not self._beyond_limit:
            seconds = self._bounds.header_timeout
            self._refuse_slow(f"the headers did not come within {seconds:g} s (header_timeout)")
        else:  # it has not begun a request
            self.transport.close()

    def _refuse_slow_body(self) -> None:
        received, self._body_bytes = self._body_bytes, 0
        if self.flow.read_paused:  # it is not read
            self._expect(self._bounds.body_timeout, self._refuse_slow_body)
        elif received >= SLOWEST_BODY:
            self._expect(received / SLOWEST_BODY, self._refuse_slow_body)
        else:
            self._refuse_slow(
                f"the body did not come within {self._bounds.body_timeout:g} s (body_timeout)"
            )

    def _refuse_slow(self, message: str) -> None:
        self._refuse(HTTPStatus.REQUEST_TIMEOUT, RequestError(message, "DEADLINE_EXCEEDED"))

    def _refuse(self, status: HTTPStatus, error: RequestError) -> None:
        """Answers and closes the connection, whatever is left to read."""
        if self.transport.is_closing():
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            self.transport.write(self._response(status, error))
        self.transport.close()

    def _response(self, status: HTTPStatus, error: RequestError) -> bytes:
        with self._observing() as observed:
            observed.status, observed.code = status, error.code
        body = json.dumps(own_error(status, error.code, str(error))).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            REQUEST_ID: observed.request_id,
            **retry_headers(error),
        }
        lines = [f"HTTP/1.1 {status:d} {status.phrase}", *map(": ".join, headers.items())]
        return "\r\n".join([*lines, "", ""]).encode() + body

    def _observing(self) -> AbstractContextManager[Observed]:
        if self.cycle and not self.cycle.response_complete and (known := observed_in(self.scope)):
            return nullcontext(known)
        caller.set(Caller("http", join_host_port(self.client)))
        return self._observer.request("")
