"""The base of the three protocols' listeners: addresses, options, and the handler of requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.access import Access
from clip_server.gateway.connections import ConnectionBounds, Connections
from clip_server.gateway.jina_protocol import JinaRequestHandler
from clip_server.gateway.lifecycle import Lifecycle
from clip_server.gateway.observation import Observer
from clip_server.gateway.router import Router
from clip_server.gateway.tls import Tls
from clip_server.launch.gateway_group import SharedCounts
from clip_server.rpc.errors import error_response
from clip_server.rpc.multiplexing import Call

# Requests of one connection that may be in flight before more are read: many, since a request
# that is not read cannot be refused.
IN_FLIGHT = 1024


@dataclass(frozen=True)
class ListenerOptions:
    """Settings of a flow's gateway that its listeners read.

    max_request_bytes: of one message or HTTP body.
    cors: whether pages of other origins may read HTTP responses.
    grpc_options: of the gRPC server, which override ours.
    compression: of responses, for clients that accept it.
    tls: None: connections are not encrypted.
    access: who may call.
    connections: the open ones of all ports, and their bounds.
    page: whether browsers get a page at `/`.
    gateways: processes that share the ports.
    """

    max_request_bytes: int
    cors: bool = False
    grpc_options: Mapping[str, Any] = field(default_factory=dict)
    compression: grpc.Compression = grpc.Compression.NoCompression
    tls: Tls | None = None
    access: Access = field(default_factory=Access)
    connections: Connections = field(
        default_factory=lambda: Connections(ConnectionBounds(), SharedCounts())
    )
    page: bool = True
    gateways: int = 1

    @property
    def shares_ports(self) -> bool:
        """Whether other gateways listen on the same ports."""
        return self.gateways > 1

    @property
    def handshake_seconds(self) -> float | None:
        """The seconds that a TLS handshake may take; None: without TLS, or as many as asyncio
        allows."""
        return (self.connections.bounds.header_timeout or None) if self.tls else None

    @property
    def compresses(self) -> bool:
        """Whether responses are compressed."""
        return self.compression is not grpc.Compression.NoCompression


@dataclass
class Listener(ABC):
    """One protocol on one port.

    call: answers a clip.v1 request; an error is in the response.
    router: the executors of the flow.
    jina: answers the requests of Jina's clients.
    observer: counts and logs requests.
    lifecycle: whether requests are taken.
    """

    host: str
    port: int
    call: Call
    router: Router
    jina: JinaRequestHandler
    observer: Observer
    lifecycle: Lifecycle
    options: ListenerOptions

    @property
    def hosts(self) -> Any:  # uvicorn and websockets hand it to asyncio, but name it a str
        """Addresses for asyncio, to which `::` is IPv6 alone; gRPC takes it for IPv4 as well."""
        return ["::", "0.0.0.0"] if self.host == "::" else [self.host]

    @abstractmethod
    async def start(self) -> None:
        """Opens the port."""

    async def count_call(self, request: pb.Request) -> pb.Response:
        """`call`, for requests of connections that the listener cannot count by itself."""
        request_id = request.id
        try:
            with self.lifecycle.request():
                answer = self.call(request)
                del request  # see `ReplicaPool.send`
                return await answer
        except RequestError as refusal:
            return error_response(request_id, refusal)

    @abstractmethod
    def count_connections(self) -> int:
        """The connections that are open."""

    @abstractmethod
    async def stop(self, seconds: float) -> None:
        """Closes the port and, when responses are sent, its connections.

        seconds: after which connections are closed whatever is in flight.
        """
