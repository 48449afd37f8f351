"""WebSocket: each binary frame out is some requests, each binary frame in some responses."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from clip_client.address import Address
from clip_client.errors import server_error
from clip_client.proto import clip_pb2
from clip_client.proxies import environment_proxy
from clip_client.tls import Trust
from clip_client.transports.base import CONNECT_SECONDS, Compression, broken, status_error
from clip_client.transports.jina_gateway import is_jina_gateway, jina_gateway_error
from clip_client.transports.multiplex import Multiplexer


def open_transport(
    address: Address,
    headers: dict[str, str],
    trust: Trust,
    compression: Compression | None = None,
) -> Multiplexer:
    """The transport for `ws://` and `wss://`."""
    proxy = environment_proxy(str(address))

    async def open_link() -> _SocketLink:
        try:
            socket = await connect(
                f"{address}/" if not address.path else str(address),
                additional_headers=headers,
                max_size=None,
                ssl=trust.context() if address.secure else None,
                proxy=proxy,
                compression="deflate" if compression else None,
                open_timeout=CONNECT_SECONDS,
                # A busy server on a small machine may answer a ping late.
                ping_timeout=120,
            )
        except InvalidStatus as error:
            answer = error.response
            body = bytes(answer.body or b"")
            returned = {name.lower(): value for name, value in answer.headers.raw_items()}
            raise status_error(str(address), answer.status_code, body, returned, proxy) from None
        except (OSError, TimeoutError, InvalidHandshake) as error:
            raise address.unreachable(error, proxy) from None
        return _SocketLink(address, socket, proxy, trust)

    return Multiplexer(open_link)


class _SocketLink:
    def __init__(
        self, address: Address, socket: ClientConnection, proxy: str | None, trust: Trust
    ) -> None:
        self._address = address
        self._proxy = proxy
        self._socket = socket
        self._trust = trust
        self._has_answered = False

    async def write(self, requests: bytes) -> None:
        await self._socket.send(requests)

    async def read(self) -> clip_pb2.Responses:
        try:
            frame = await self._socket.recv()
        except ConnectionClosed as error:
            if not self._has_answered and await is_jina_gateway(
                self._address, self._trust, self._proxy
            ):
                raise jina_gateway_error(self._address) from None
            reason = f"the connection broke: {error}"
            raise broken(self._address.unreachable(reason, self._proxy)) from None
        self._has_answered = True
        try:
            if isinstance(frame, bytes):
                return clip_pb2.Responses.FromString(frame)
        except DecodeError:
            pass
        raise server_error("UNKNOWN", f"{self._address} sent a frame that is no clip.v1.Responses")

    async def close(self) -> None:
        await self._socket.close()
