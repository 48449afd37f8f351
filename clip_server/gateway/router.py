"""Chooses which executor of the flow answers a request, and refuses more than the gateway holds."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError, RequestError
from clip_server.gateway.replicas import ReplicaPool
from clip_server.rpc.errors import error_response

log = logging.getLogger(__name__)


class Router:
    """The executors of a flow, and which of them answers clip.v1.

    pools: one for each executor of the flow.
    max_queued_bytes: of requests in flight; beyond it, more are refused.
    """

    def __init__(self, pools: Sequence[ReplicaPool], max_queued_bytes: int) -> None:
        self._pools = pools
        self._max_queued_bytes = max_queued_bytes
        self._in_flight_bytes = 0
        self._encoder: ReplicaPool | None = None
        # Of one request; the encoder says how many once it is found.
        self.max_request_items = 0

    async def discover(self, is_cancelled: asyncio.Event) -> None:
        """Waits until an encoder answers.

        Raises:
            ConfigurationError: the flow has none.
        """
        for pool in self._pools:
            if info := await pool.find_info(is_cancelled):
                self._encoder = pool
                self.max_request_items = info.max_request_items
                log.debug("executor %s encodes, on %d replicas", pool.name, len(pool))
                return
        if not is_cancelled.is_set():
            raise ConfigurationError("no executor of this flow is a CLIPEncoder")

    async def call(self, request: pb.Request) -> pb.Response:
        """The response to `request`; an error on the way to the executor is in it too."""
        started, request_id, size = time.perf_counter(), request.id, request.ByteSize()
        self._in_flight_bytes += size
        try:
            self._refuse_if_full(size)
            response = await self._send(request)
            response.id = request_id
        except RequestError as error:
            response = error_response(request_id, error)
        finally:
            self._in_flight_bytes -= size
        kind = response.WhichOneof("body")
        if kind in ("encode", "rank"):
            timings = getattr(response, kind).timings
            timings.gateway = (time.perf_counter() - started) * 1e3 - timings.total
        return response

    async def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of each replica that answers, by its address."""
        return await self._encoder.metrics() if self._encoder else {}

    async def _send(self, request: pb.Request) -> pb.Response:
        if self._encoder is None:
            raise RequestError("the server is starting: try again in a moment", "UNAVAILABLE")
        return await self._encoder.send(request)

    def _refuse_if_full(self, size: int) -> None:
        # One that is larger than the bound is taken by an idle server.
        if self._max_queued_bytes < self._in_flight_bytes != size:
            raise RequestError(
                f"the server is full: requests of {self._in_flight_bytes / 2**20:,.0f} MiB are in "
                f"flight, and it takes {self._max_queued_bytes / 2**20:,.0f} MiB at most; try "
                "again in a moment",
                "RESOURCE_EXHAUSTED",
                retry_after=1.0,
            )

    async def close(self) -> None:
        """Closes the streams to the executors."""
        await asyncio.gather(*(pool.close() for pool in self._pools))


def replica_pools(deployments: Mapping[str, Any], timeout: float | None) -> list[ReplicaPool]:
    """A pool for each executor, from the gRPC addresses that Jina hands to a gateway."""
    return [
        ReplicaPool(name, addresses if isinstance(addresses, list) else addresses["grpc"], timeout)
        for name, addresses in deployments.items()
    ]
