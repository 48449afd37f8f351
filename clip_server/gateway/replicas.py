"""The replicas of one executor of a flow, each on a kept stream of clip.v1.

Jina's own streamer costs 5.5 ms a call and tops out below 400 calls a second. On a stream,
waiting requests share a message, and each keeps its own answer, error, deadline and cancellation.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric

from clip_client.address import Address
from clip_client.errors import ClientClosedError, ConnectionFailedError, ServerError
from clip_client.proto import clip_pb2 as pb
from clip_client.transports.grpc import open_transport
from clip_server.errors import ConfigurationError, RequestError
from clip_server.launch.jina_internals import TimeCall, untimed
from clip_server.rpc.errors import FAILED
from clip_server.rpc.items import count_items
from clip_server.rpc.metrics import read_text

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05
_METRICS_SECONDS = 1.0
# What a replica raises that does not answer.
_SILENCE = (ClientClosedError, ConnectionFailedError, ServerError, asyncio.TimeoutError)


class _Replica:
    """A kept stream to one replica, with the items in flight on it and when it was last used."""

    def __init__(self, address: str) -> None:
        self.address = Address.parse(f"grpc://{address.split('://')[-1]}")
        self.transport = open_transport(self.address, {})
        self.in_flight_items = 0
        self.last_turn = 0


class ReplicaPool:
    """The replicas of one executor: each request goes to the least busy one.

    name: of the executor in the flow.
    addresses: of its replicas.
    timeout: seconds until a call is given up; None: never.
    timed: records the calls.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        timeout: float | None,
        timed: TimeCall = untimed,
    ) -> None:
        self.name, self._timed = name, timed
        self._replicas = [_Replica(address) for address in addresses]
        self._timeout = timeout
        self._turns = itertools.count(1)

    def __len__(self) -> int:
        return len(self._replicas)

    async def find_info(self, is_cancelled: asyncio.Event) -> pb.InfoResponse | None:
        """Waits until a replica answers. None: it neither encodes nor holds a collection, or the
        start is cancelled.

        Raises:
            ConfigurationError: it answers with an error.
        """
        while not is_cancelled.is_set():
            for replica in self._replicas:
                try:
                    response = await replica.transport.send(pb.Request(info=pb.InfoRequest()))
                    info = response.info
                    return info if info.dim or info.HasField("collection") else None
                except ConnectionFailedError:
                    continue  # not yet
                except ServerError as error:
                    if error.code == "UNIMPLEMENTED":
                        return None
                    raise ConfigurationError(
                        f"executor {self.name} does not answer: {error}"
                    ) from None
            await asyncio.sleep(_RETRY_SECONDS)
        return None

    async def send(self, request: pb.Request) -> pb.Response:
        """The response of the least busy replica; of equally busy ones each in its turn.

        Raises:
            RequestError: no replica answers, or none in time.
        """
        items = count_items(request)
        if items is None:
            return await self._send(request)
        endpoint = f"/{request.WhichOneof('body')}"
        with self._timed(endpoint, items, "") as trace:
            if trace:
                request.traceparent = trace.traceparent
            return await self._send(request)

    async def _send(self, request: pb.Request) -> pb.Response:
        items = len(request.encode.items) + len(request.rank.candidates) + 1
        for replica in sorted(self._replicas, key=lambda r: (r.in_flight_items, r.last_turn)):
            replica.in_flight_items += items
            replica.last_turn = next(self._turns)
            try:
                return await asyncio.wait_for(replica.transport.send(request), self._timeout)
            except (ClientClosedError, ConnectionFailedError):
                continue  # it is gone: the next one may serve
            except asyncio.TimeoutError:
                raise RequestError(
                    f"executor {self.name} did not answer in time", "DEADLINE_EXCEEDED"
                ) from None
            except ServerError as error:
                log.error("a call to executor %s failed: %s", self.name, error)
                raise RequestError(FAILED, "INTERNAL") from None
            finally:
                replica.in_flight_items -= items
        raise RequestError(
            f"no replica of executor {self.name} is ready: try again in a moment", "UNAVAILABLE"
        )

    async def send_to_each(self, request: pb.Request) -> list[pb.Response]:
        """The responses of all replicas, once each of them answers."""

        async def ask(replica: _Replica) -> pb.Response:
            while True:
                # A transport numbers the message that it sends.
                own = pb.Request()
                own.CopyFrom(request)
                try:
                    return await replica.transport.send(own)
                except ConnectionFailedError:
                    await asyncio.sleep(_RETRY_SECONDS)  # not yet

        return await asyncio.gather(*map(ask, self._replicas))

    async def counts(self) -> dict[str, dict[str, float]]:
        """Counters of items of each replica that answers, by its address."""
        found: dict[str, dict[str, float]] = {}

        async def ask(replica: _Replica) -> None:
            with contextlib.suppress(*_SILENCE):
                request = pb.Request(metrics=pb.MetricsRequest())
                answer = await asyncio.wait_for(replica.transport.send(request), _METRICS_SECONDS)
                found[replica.address.target] = dict(answer.metrics.counts)

        await asyncio.gather(*map(ask, self._replicas))
        return found

    async def metrics(self, model: str = "") -> list[Metric]:
        """Metrics of each replica that answers, labelled with its executor, number and model."""
        up = GaugeMetricFamily(
            "clip_replica_up",
            "1 if the replica answered this scrape, else 0",
            labels=("executor", "replica", "model"),
        )

        async def ask(number: int, replica: _Replica) -> list[Metric]:
            labels = {"executor": self.name, "replica": str(number), "model": model}
            request = pb.Request(metrics=pb.MetricsRequest(text=True))
            try:
                response = await asyncio.wait_for(replica.transport.send(request), _METRICS_SECONDS)
            except _SILENCE:
                up.add_metric(list(labels.values()), 0)
                return []
            up.add_metric(list(labels.values()), 1)
            return [*read_text(response.metrics.text, labels)]

        found = await asyncio.gather(*itertools.starmap(ask, enumerate(self._replicas)))
        return [up, *itertools.chain.from_iterable(found)]

    async def close(self) -> None:
        """Closes the streams."""
        for replica in self._replicas:
            await replica.transport.close()


def replica_pools(
    deployments: Mapping[str, Any], timeout: float | None, timed: TimeCall = untimed
) -> list[ReplicaPool]:
    """A pool for each executor, from the gRPC addresses that Jina hands to a gateway.

    timeout, timed: see ReplicaPool.
    """
    return [
        ReplicaPool(
            name,
            addresses if isinstance(addresses, list) else addresses["grpc"],
            timeout,
            timed,
        )
        for name, addresses in deployments.items()
    ]
