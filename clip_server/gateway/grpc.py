"""The gRPC port: clip.v1, Jina's own protocol, health and reflection."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from clip_client.address import Address
from clip_server.gateway.access import GrpcAccess
from clip_server.gateway.compression import NO_GRPC_INFLATION, GrpcInflation
from clip_server.gateway.grpc_connections import (
    ConnectionsOfAddresses,
    MessagesInTime,
    client_of,
    count_connections,
)
from clip_server.gateway.jina_protocol import JINA_SERVICES, jina_handlers
from clip_server.gateway.listener import IN_FLIGHT, Listener
from clip_server.gateway.observation import REQUEST_ID, TRACEPARENT, Caller, Observed, caller
from clip_server.rpc.grpc_service import SERVICE, Context, clip_handlers
from clip_server.rpc.multiplexing import StreamServer

# Between two looks at whether the server is ready.
_HEALTH_SECONDS = 0.1
# Between two pings of a client, and how long one may take to answer: it may be busy.
_KEEPALIVE_MS = 60_000
# A connection without calls is closed after this.
_IDLE_MS = 300_000
# The message of a unary call that comes at this rate, or faster, is never too slow. Bytes a second.
_SLOWEST_MESSAGE = 4 << 20


class GrpcListener(Listener):
    """Serves gRPC."""

    async def start(self) -> None:
        """Opens the port."""
        bounds = self.options.connections.bounds
        self._connections = ConnectionsOfAddresses(
            bounds, self.options.connections.counts, self._observe_refused
        )
        self._server = grpc.aio.server(
            options=list(self._server_options().items()),
            interceptors=[
                *self._bounds_on_messages(),
                self._connections,
                GrpcAccess(self.options.access, self._observe_refused),
                GrpcInflation(self.options.max_request_bytes),
            ],
            compression=self.options.compression,
        )
        self._streams = StreamServer(
            self.observer.observing(self.count_call), IN_FLIGHT, bounds.draw_age
        )
        clip = clip_handlers(self.count_call, self._streams, self._observe, self._begin)
        jina = jina_handlers(self.jina, self._observe, self._begin)
        self._server.add_generic_rpc_handlers((clip, *jina))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._bind()
        await self._server.start()
        self._following = [asyncio.create_task(self._report_health())]
        if self.options.shares_ports:
            self._following.append(asyncio.create_task(self._connections.watch()))

    def _bounds_on_messages(self) -> list[MessagesInTime]:
        seconds = self.options.connections.bounds.body_timeout
        if not seconds:
            return []
        seconds += self.options.max_request_bytes / _SLOWEST_MESSAGE
        return [MessagesInTime(seconds, self._observe_refused)]

    async def _report_health(self) -> None:
        """Says whether the server is ready, as `/readyz` does over HTTP, for ever."""
        said: bool | None = None
        while True:
            if (is_ready := not self.lifecycle.why_not_ready()) is not said:
                said, response = is_ready, health_pb2.HealthCheckResponse
                status = response.SERVING if is_ready else response.NOT_SERVING
                for name in ("", SERVICE, *JINA_SERVICES.values()):
                    await self._health.set(name, status)
            await asyncio.sleep(_HEALTH_SECONDS)

    def _server_options(self) -> dict[str, Any]:
        bounds = self.options.connections.bounds
        # gRPC draws it anew for each connection, and lets calls in flight finish.
        seconds = {
            "grpc.max_connection_age_ms": bounds.max_connection_age,
            "grpc.server_handshake_timeout_ms": bounds.header_timeout,
        }
        return {
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": self.options.max_request_bytes,
            "grpc.max_concurrent_streams": IN_FLIGHT,
            "grpc.max_connection_idle_ms": _IDLE_MS,
            # Closes those beyond it, before they have said anything; counts those of this process.
            "grpc.max_allowed_incoming_connections": math.ceil(
                bounds.max_connections / self.options.gateways
            ),
            **NO_GRPC_INFLATION,
            "grpc.http2.max_ping_strikes": 0,  # an idle client may ping as often as it likes
            "grpc.keepalive_time_ms": _KEEPALIVE_MS,
            "grpc.keepalive_timeout_ms": _KEEPALIVE_MS,
            "grpc.keepalive_permit_without_calls": 1,
            "grpc.http2.max_pings_without_data": 0,
            **{name: round(1000 * value) for name, value in seconds.items() if value},
            # A second server on the port is an error, not a lottery.
            "grpc.so_reuseport": int(self.options.shares_ports),
            **self.options.grpc_options,
        }

    def _bind(self) -> None:
        address, tls = Address("grpc", self.host, self.port).target, self.options.tls
        if tls is None:
            self._server.add_insecure_port(address)
        else:
            self._server.add_secure_port(address, tls.grpc_credentials())

    def _begin(self, context: Context) -> None:
        """Notes who makes the calls of this task."""
        metadata = dict(context.invocation_metadata() or ())
        given = (str(metadata.get(name, "")) for name in (REQUEST_ID, TRACEPARENT))
        caller.set(Caller("grpc", client_of(context), *given))

    @contextmanager
    def _observe(self, endpoint: str, context: Context) -> Iterator[Observed]:
        self._begin(context)
        with self.observer.request(endpoint) as observed:
            context.set_trailing_metadata(((REQUEST_ID, observed.request_id),))
            yield observed

    def _observe_refused(self, method: str, context: Context) -> AbstractContextManager[Observed]:
        """Observes a call that is refused as a request to its method's endpoint."""
        return self._observe(f"/{method.rpartition('/')[2].lower()}", context)

    def count_connections(self) -> int:
        """The connections that are open."""
        return count_connections()

    async def stop(self, seconds: float) -> None:
        for task in self._following:
            task.cancel()
        self._streams.drain()
        await self._server.stop(grace=seconds)
