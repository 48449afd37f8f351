"""The gRPC port: clip.v1, Jina's own protocol, health and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from jina.proto import jina_pb2, jina_pb2_grpc
from jina.serve.runtimes.gateway.request_handling import GatewayRequestHandler

from clip_client.address import Address
from clip_server.gateway.listener import GRACE_SECONDS, IN_FLIGHT, Listener
from clip_server.rpc.errors import FAILED
from clip_server.rpc.grpc_service import SERVICE, clip_handlers
from clip_server.rpc.multiplexing import Streams


class GrpcListener(Listener):
    """Serves gRPC. See Listener."""

    async def start(self) -> None:
        """See Listener."""
        self._server = grpc.aio.server(options=list(self._options().items()))
        self._streams = Streams(self.call, IN_FLIGHT)
        self._server.add_generic_rpc_handlers((clip_handlers(self.call, self._streams),))
        _add_jina(self._server, JinaDoor(self.jina, self.args.prefetch))
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )
        self._bind()
        await self._server.start()
        for name in ("", SERVICE, *_jina_services()):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def _options(self) -> dict[str, Any]:
        return {
            "grpc.max_send_message_length": -1,
            "grpc.max_receive_message_length": self.max_request_bytes,
            "grpc.http2.max_ping_strikes": 0,  # an idle client may ping as often as it likes
            "grpc.so_reuseport": 0,  # a second server on the port is an error, not a lottery
            **(self.args.grpc_server_options or {}),
        }

    def _bind(self) -> None:
        address = Address("grpc", self.host, self.port).target
        if self.tls is None:
            self._server.add_insecure_port(address)
        else:
            pair = (self.tls.key.read_bytes(), self.tls.certificate.read_bytes())
            self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))

    async def stop(self) -> None:
        """See Listener."""
        await self._health.enter_graceful_shutdown()
        self._streams.drain()
        await self._server.stop(grace=GRACE_SECONDS)


class JinaDoor:
    """What a Jina client needs of a gateway, with nothing of the server in its errors."""

    def __init__(self, handler: GatewayRequestHandler, prefetch: int) -> None:
        """prefetch: requests of one stream that may be under way."""
        self._handler, self._prefetch = handler, prefetch

    async def Call(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Jina's streaming call. The answers come in the order of the requests.

        Not by Jina's own streamer: asked for that order, it waits forever if the last answer is
        there before it hears that there are no more requests.
        """
        under_way: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        free = asyncio.Semaphore(self._prefetch)

        async def begin() -> None:
            try:
                async for request in requests:
                    await free.acquire()
                    answer = self.process_single_data(request, context)
                    under_way.put_nowait(asyncio.create_task(answer))
            finally:
                under_way.put_nowait(None)

        beginning = asyncio.create_task(begin())
        try:
            while (task := await under_way.get()) is not None:
                yield await task
                free.release()
            await beginning
        finally:
            beginning.cancel()
            while not under_way.empty():
                if (task := under_way.get_nowait()) is not None:
                    task.cancel()

    async def process_single_data(self, request: Any, context: Any) -> Any:
        """Jina's unary call."""
        return _scrub(await self._handler.process_single_data(request, context))

    async def dry_run(self, empty: Any, context: Any) -> Any:
        """Whether the flow answers."""
        status = await self._handler.dry_run(empty, context)
        status.ClearField("exception")
        return status

    async def endpoint_discovery(self, empty: Any, context: Any) -> Any:
        """The endpoints and their schemas."""
        return await self._handler.endpoint_discovery(empty, context)


def _scrub(response: Any) -> Any:
    """Leaves of an executor's exception what was meant for the client."""
    status = response.header.status
    if status.code == jina_pb2.StatusProto.ERROR:
        ours = status.exception.name == "RequestError" and status.exception.args
        said = status.exception.args[0] if ours else FAILED
        for route in response.proto.routes if hasattr(response, "proto") else ():
            route.status.ClearField("exception")
            route.status.description = ""
        status.ClearField("exception")
        status.description = said
    return response


def _add_jina(server: grpc.aio.Server, door: JinaDoor) -> None:
    jina_pb2_grpc.add_JinaRPCServicer_to_server(door, server)
    jina_pb2_grpc.add_JinaSingleDataRequestRPCServicer_to_server(door, server)
    jina_pb2_grpc.add_JinaGatewayDryRunRPCServicer_to_server(door, server)
    jina_pb2_grpc.add_JinaDiscoverEndpointsRPCServicer_to_server(door, server)


def _jina_services() -> list[str]:
    names = (
        "JinaRPC",
        "JinaSingleDataRequestRPC",
        "JinaGatewayDryRunRPC",
        "JinaDiscoverEndpointsRPC",
    )
    return [jina_pb2.DESCRIPTOR.services_by_name[name].full_name for name in names]
