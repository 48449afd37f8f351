"""The WebSocket port: each binary frame in is clip.v1 Requests, each one out Responses.

Jina's clients are told apart by the subprotocol that they ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CTRL_OPCODES, CloseCode, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import Event, State
from websockets.typing import Subprotocol

from clip_server.errors import RequestError
from clip_server.gateway.access import CHALLENGE
from clip_server.gateway.compression import BoundedDeflateFactory, deflated
from clip_server.gateway.connections import SLOWEST_BODY, Connections
from clip_server.gateway.http_messages import code_of, retry_headers, status_of
from clip_server.gateway.jina_protocol import is_error, serialize
from clip_server.gateway.listener import IN_FLIGHT, Listener
from clip_server.gateway.observation import (
    REQUEST_ID,
    TRACEPARENT,
    Caller,
    Observer,
    caller,
    join_host_port,
)
from clip_server.rpc.multiplexing import Send, StreamServer

# Jina's clients ask for it; each frame is then one of its requests or responses.
_JINA = Subprotocol("bytes")
# What they send when they have no more requests.
_JINA_END = bytes(True)
# How long it may take to read a response.
_READING_SECONDS = 0.5
# The longest reason that fits the frame that closes a connection, in bytes.
_LONGEST_REASON = 123

# Of one message: each takes memory, even if it is empty. Newer versions of the library have the
# same limit, and do not name it.
_MOST_FRAGMENTS = 4096
# How long a client whose connection is given up may take to close it.
_CLOSING_SECONDS = 1.0
# How long a client may take to answer a ping: it may be busy.
_PING_TIMEOUT = 60.0


class WebSocketListener(Listener):
    """Serves WebSocket."""

    _server: Server

    async def start(self) -> None:
        """Opens the port."""
        bounds = self.options.connections.bounds
        observed = self.observer.observing(self.count_call)
        self._streams = StreamServer(observed, IN_FLIGHT, bounds.draw_age)
        tls = self.options.tls
        self._server = await serve(
            self._serve,
            self.hosts,
            self.port,
            ssl=tls.context() if tls else None,
            ssl_handshake_timeout=self.options.handshake_seconds,
            process_request=self._check_handshake,
            create_connection=partial(  # type: ignore[arg-type]
                _CountedConnection, self.options.connections, self.observer
            ),
            open_timeout=bounds.header_timeout or None,
            ping_timeout=_PING_TIMEOUT,
            select_subprotocol=lambda _, offered: _JINA if _JINA in offered else None,
            max_size=self.options.max_request_bytes,
            server_header=None,
            reuse_port=self.options.shares_ports,
            compression=None,  # the library's own: bounded by the size of a message only
            extensions=[
                BoundedDeflateFactory(self.options.max_request_bytes, self.options.compresses)
            ],
        )

    def _check_handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response that refuses a handshake; None: it is accepted."""
        assert isinstance(connection, _CountedConnection)
        headers = {name.lower(): value for name, value in request.headers.raw_items()}
        try:
            if connection.beyond_limit:
                raise connection.beyond_limit
            self.options.access.identify(headers)
        except RequestError as error:
            status = status_of(error.code)
            response = connection.respond(status, f"{error}\n")
            response.headers.update(retry_headers(error))
            if status == HTTPStatus.UNAUTHORIZED:
                response.headers.update(CHALLENGE)
            return response
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        async def send(message: bytes) -> None:
            await connection.send(await deflated(message, connection.protocol.extensions))

        _begin(connection)
        with contextlib.suppress(ConnectionClosed):
            if connection.subprotocol == _JINA:
                await self._serve_jina(connection, send)
            else:
                await self._streams.serve(_messages(connection), send)
                await connection.close(CloseCode.GOING_AWAY, "connect again")

    async def _serve_jina(self, connection: ServerConnection, send: Send) -> None:
        if connection.request and connection.request.path == "/dry_run":
            await connection.recv()
            await connection.send(await self.jina.is_ready())
            return
        failed = False
        try:
            async for response in self.jina.answer_all(_jina_messages(connection)):
                failed = failed or is_error(response)
                await send(serialize(response))
            if failed:
                # The client forgets an error that it has not yet read when the connection closes.
                await asyncio.wait_for(connection.wait_closed(), _READING_SECONDS)
        except asyncio.TimeoutError:
            pass  # it handles the error by itself, and waits for the end
        except RequestError as error:
            # A Jina client reports the reason of no other code.
            reason = str(error).encode()[:_LONGEST_REASON].decode(errors="ignore")
            await connection.close(CloseCode.INTERNAL_ERROR, reason)

    def count_connections(self) -> int:
        """The connections that are open."""
        return len(self._server.connections)

    async def stop(self, seconds: float) -> None:
        self._streams.drain()
        self._server.close(close_connections=False)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), seconds)


def _begin(connection: ServerConnection) -> None:
    """Notes who makes the requests of this task."""
    headers = connection.request.headers if connection.request else Headers()
    given = (next(iter(headers.get_all(name)), "") for name in (REQUEST_ID, TRACEPARENT))
    caller.set(Caller("websocket", join_host_port(connection.remote_address), *given))


class _CountedConnection(ServerConnection):
    """A connection that is counted while it is open, and observed if its handshake is refused.

    beyond_limit: why it is one too many.
    """

    beyond_limit: RequestError | None = None

    def __init__(
        self, connections: Connections, observer: Observer, *args: Any, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._all, self._observer, self._address = connections, observer, ""
        # Every refusal is made by this method, also those of what the library cannot read.
        self._refuse, self.protocol.reject = self.protocol.reject, self._refuse_observed  # type: ignore[method-assign]
        self._timer: asyncio.TimerHandle | None = None
        # Bytes since the last look, and the fragments of a message that has more.
        self._received = self._fragments = 0
        # Of a message whose end has not come yet: its fragments, and all of it.
        self._fragment_bytes = self._held_bytes = 0

    def _refuse_observed(self, status: HTTPStatus | int, text: str) -> Response:
        """The response to a handshake that is refused, with an id."""
        _begin(self)
        path = self.request.path.partition("?")[0] if self.request else ""
        with self._observer.request(path) as observed:
            observed.code, observed.status = code_of(status), status
        response = self._refuse(status, text)
        response.headers[REQUEST_ID] = observed.request_id
        return response

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        self.beyond_limit = self._all.add(self._address)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._received += len(data)
        if self.state is not State.OPEN:
            return
        refusal = self._hold(self._fragment_bytes + len(self.protocol.reader.buffer))
        if refusal:
            self._give_up(CloseCode.TRY_AGAIN_LATER, str(refusal)[:_LONGEST_REASON])
        elif not self._fragments and not self.protocol.reader.buffer:
            self._expect_nothing()
        elif self._timer is None:
            self._expect_message()

    def _hold(self, count: int) -> RequestError | None:
        """Counts bytes of a message whose end has not come yet. Returns why they are too many."""
        more, self._held_bytes = count - self._held_bytes, count
        return self._all.receive(more, count)

    def process_event(self, event: Event) -> None:
        if isinstance(event, Frame) and event.opcode not in CTRL_OPCODES:
            self._fragments = 0 if event.fin else self._fragments + 1
            self._fragment_bytes = 0 if event.fin else self._fragment_bytes + len(event.data)
        if self._fragments >= _MOST_FRAGMENTS and self.state is State.OPEN:
            reason = f"the message has more than {_MOST_FRAGMENTS:,} fragments"
            self._give_up(CloseCode.MESSAGE_TOO_BIG, reason)
        if isinstance(event, Frame) and event.opcode is Opcode.PING and self.paused:
            # Each ping is answered: the answers would fill the memory if nobody reads them.
            self.transport.pause_reading()
        super().process_event(event)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.recv_messages.paused:
            self.transport.resume_reading()

    def _expect_message(self) -> None:
        """Closes the connection if the rest of a message does not come fast enough."""
        seconds, self._received = self._all.bounds.body_timeout, 0

        def look() -> None:
            is_read = not self.recv_messages.paused
            if is_read and self._received < seconds * SLOWEST_BODY:
                reason = f"the message did not come within {seconds:g} s (body_timeout)"
                self._give_up(CloseCode.POLICY_VIOLATION, reason)
            else:
                self._expect_message()

        if seconds:
            self._timer = self.loop.call_later(seconds, look)

    def _give_up(self, code: CloseCode, reason: str) -> None:
        """Closes the connection, and drops what still comes."""
        self.protocol.fail(code, reason)
        self.send_data()
        self._expect_nothing()
        self._timer = self.loop.call_later(_CLOSING_SECONDS, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        del self.protocol.reject  # which refers to this object
        self._expect_nothing()
        self._hold(0)
        self._all.remove(self._address)
        super().connection_lost(exc)


async def _messages(connection: ServerConnection) -> AsyncIterator[bytes]:
    while True:  # until the connection is closed, which cancels requests in flight
        message = await connection.recv()
        # A text frame is no clip.v1 message; empty bytes are refused as an empty request.
        yield message if isinstance(message, bytes) else b""


async def _jina_messages(connection: ServerConnection) -> AsyncIterator[bytes]:
    async for message in _messages(connection):
        if message == _JINA_END:
            return
        yield message
