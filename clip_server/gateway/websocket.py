"""The WebSocket port: each binary frame in is clip.v1 Requests, each one out Responses."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from clip_server.gateway.listener import GRACE_SECONDS, IN_FLIGHT, Listener
from clip_server.rpc.multiplexing import StreamServer


class WebSocketListener(Listener):
    """Serves WebSocket."""

    _server: Server

    async def start(self) -> None:
        """Opens the port."""
        self._streams = StreamServer(self.call, IN_FLIGHT)
        context, tls = None, self.options.tls
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(tls.certificate, tls.key)
        self._server = await serve(
            self._serve,
            self.hosts,
            self.port,
            ssl=context,
            max_size=self.options.max_request_bytes,
            compression=None,  # images and floats do not compress; trying costs CPU time
        )

    async def _serve(self, connection: ServerConnection) -> None:
        async def send(message: bytes) -> None:
            await connection.send(message)

        with contextlib.suppress(ConnectionClosed):
            await self._streams.serve(_messages(connection), send)

    async def stop(self) -> None:
        """Accepts nothing new, lets requests in flight finish, and closes the port."""
        self._streams.drain()
        self._server.close(close_connections=False)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), GRACE_SECONDS)


async def _messages(connection: ServerConnection) -> AsyncIterator[bytes]:
    while True:  # until the connection is closed, which cancels requests in flight
        message = await connection.recv()
        # A text frame is no clip.v1 message; empty bytes are refused as an empty request.
        yield message if isinstance(message, bytes) else b""
