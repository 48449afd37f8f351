"""Jina's own protocol, for its clients on the gRPC port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from jina.proto import jina_pb2, jina_pb2_grpc
from jina.serve.runtimes.gateway.request_handling import GatewayRequestHandler

from clip_server.rpc.errors import FAILED

_SERVICES = (
    "JinaRPC",
    "JinaSingleDataRequestRPC",
    "JinaGatewayDryRunRPC",
    "JinaDiscoverEndpointsRPC",
)


class JinaRequestHandler:
    """Answers the requests of Jina's clients; errors carry nothing of the server's internals.

    handler: Jina's own, which sends a request through the flow.
    prefetch: requests of one stream that may be in flight.
    """

    def __init__(self, handler: GatewayRequestHandler, prefetch: int) -> None:
        self._handler, self._prefetch = handler, prefetch

    async def Call(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """Answers a stream of requests, in their order.

        Not by Jina's own streamer: asked for that order, it waits forever if the last answer is
        there before it hears that there are no more requests.
        """
        in_flight: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        free = asyncio.Semaphore(self._prefetch)

        async def begin() -> None:
            try:
                async for request in requests:
                    await free.acquire()
                    answer = self.process_single_data(request, context)
                    in_flight.put_nowait(asyncio.create_task(answer))
            finally:
                in_flight.put_nowait(None)

        beginning = asyncio.create_task(begin())
        try:
            while (task := await in_flight.get()) is not None:
                yield await task
                free.release()
            await beginning
        finally:
            beginning.cancel()
            while not in_flight.empty():
                if (task := in_flight.get_nowait()) is not None:
                    task.cancel()

    async def process_single_data(self, request: Any, context: Any) -> Any:
        """Answers one request."""
        return _scrub(await self._handler.process_single_data(request, context))

    async def dry_run(self, empty: Any, context: Any) -> Any:
        """Whether the flow answers."""
        status = await self._handler.dry_run(empty, context)
        status.ClearField("exception")
        return status

    async def endpoint_discovery(self, empty: Any, context: Any) -> Any:
        """The endpoints and their schemas."""
        return await self._handler.endpoint_discovery(empty, context)


def add_jina_services(server: grpc.aio.Server, handler: JinaRequestHandler) -> None:
    """Serves Jina's protocol."""
    jina_pb2_grpc.add_JinaRPCServicer_to_server(handler, server)
    jina_pb2_grpc.add_JinaSingleDataRequestRPCServicer_to_server(handler, server)
    jina_pb2_grpc.add_JinaGatewayDryRunRPCServicer_to_server(handler, server)
    jina_pb2_grpc.add_JinaDiscoverEndpointsRPCServicer_to_server(handler, server)


def jina_services() -> list[str]:
    """The full names of the services."""
    return [jina_pb2.DESCRIPTOR.services_by_name[name].full_name for name in _SERVICES]


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
