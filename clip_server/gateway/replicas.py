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
from typing import Any, TypeAlias

from prometheus_client.core import GaugeMetricFamily, Metric

from clip_client.address import Address
from clip_client.errors import ClientClosedError, ConnectionFailedError, ServerError
from clip_client.proto import clip_pb2 as pb
from clip_client.transports.grpc import open_transport
from clip_server.errors import ConfigurationError, RequestError
from clip_server.launch import heartbeats
from clip_server.launch.gateway_group import SharedCounts
from clip_server.launch.jina_internals import TimeCall, untimed
from clip_server.rpc.errors import FAILED
from clip_server.rpc.items import count_items
from clip_server.rpc.metrics import read_text

log = logging.getLogger(__name__)

# Numbers of the replicas that answer, by their address and by name.
Counts: TypeAlias = Mapping[str, Mapping[str, float]]

_RETRY_SECONDS = 0.05
# Told to clients while no replica answers, as one that died takes some seconds to start.
_RETRY_AFTER_SECONDS = 0.5
_METRICS_SECONDS = 1.0
# What a replica raises that does not answer.
_SILENCE = (ClientClosedError, ConnectionFailedError, ServerError, asyncio.TimeoutError)
# Between two looks at a replica, and how long one that exists may take to be found.
_LOOK_SECONDS, _FIND_SECONDS = 0.5, 2.0
# See ReplicaPool.
SILENCE_SECONDS = 2.0


class _Replica:
    """A kept stream to one replica, with the items in flight on it and when it was last used.

    is_up: whether it has accepted the last connection.
    is_silent: whether it shows no sign of life, as far as that is known.
    """

    def __init__(self, address: str, silence_seconds: float, counts: SharedCounts) -> None:
        self._silence_seconds, self._counts = silence_seconds, counts
        self._items = f"items on {address}"
        self.address = Address.parse(f"grpc://{address.split('://')[-1]}")
        self.transport = open_transport(self.address, {})
        self.last_turn = 0
        self.is_up, self.is_silent = True, False
        self._pulse = heartbeats.Pulse(self.address.port)

    @property
    def in_flight_items(self) -> int:
        """Items of all gateways."""
        return self._counts.total(self._items)

    @property
    def own_items(self) -> int:
        """Items of this gateway."""
        return self._counts.own(self._items)

    def add_items(self, number: int) -> None:
        """Counts items as in flight, or as no longer."""
        self._counts.add(self._items, number)

    @property
    def can_answer(self) -> bool:
        """Whether requests may be sent to it."""
        return self.is_up and not self.is_silent

    def listen(self) -> None:
        """Notes whether it is silent; called regularly."""
        self.is_silent = self._pulse.silence() > self._silence_seconds

    async def send_copy(self, request: pb.Request) -> pb.Response:
        """The response to a message that is sent more than once: a transport numbers it."""
        own = pb.Request()
        own.CopyFrom(request)
        return await self.transport.send(own)

    async def break_off(self) -> None:
        """Makes the requests in flight fail, as if it had died; it drops those, if it wakes up."""
        broken, self.transport = self.transport, open_transport(self.address, {})
        await broken.close()


class ReplicaPool:
    """The replicas of one executor: each request goes to the least busy one.

    name: of the executor in the flow.
    addresses: of its replicas.
    timeout: seconds until a call is given up; None: never.
    timed: records the calls.
    silence_seconds: a replica that shows no sign of life for so long gets no requests while others
        answer, and those in flight on it move to them.
    counts: the items in flight on each replica, those of other gateways too.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        timeout: float | None,
        timed: TimeCall = untimed,
        silence_seconds: float = SILENCE_SECONDS,
        counts: SharedCounts | None = None,
    ) -> None:
        self.name, self._timed = name, timed
        counts = counts or SharedCounts()
        self._replicas = [_Replica(address, silence_seconds, counts) for address in addresses]
        self._timeout = timeout
        self._turns = itertools.count(1)
        # Asks a replica whether it is there. An empty request is refused, which is an answer.
        self.probe = pb.Request()

    @property
    def can_answer(self) -> bool:
        """Whether a replica can answer a request now: none is dead, starting or hanging."""
        return any(replica.can_answer for replica in self._replicas)

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
                    response = await asyncio.wait_for(
                        replica.transport.send(pb.Request(info=pb.InfoRequest())), _FIND_SECONDS
                    )
                    info = response.info
                    return info if info.dim or info.HasField("collection") else None
                except (ConnectionFailedError, asyncio.TimeoutError):
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

        The request is released once the last replica that may answer it has it, by all callers:
        its images would be in memory until they are encoded.

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
            answer = self._send(request)
            del request
            return await answer

    async def _send(self, request: pb.Request) -> pb.Response:
        items = len(request.encode.items) + len(request.rank.candidates) + 1
        replicas = sorted(
            self._replicas, key=lambda r: (not r.can_answer, r.in_flight_items, r.last_turn)
        )
        for replica in replicas:
            replica.add_items(items)
            replica.last_turn = next(self._turns)
            answer = replica.transport.send(request)
            if replica is replicas[-1]:
                del request  # see `send`
            try:
                return await asyncio.wait_for(answer, self._timeout)
            except ClientClosedError:
                continue  # it is silent: the next one may serve
            except ConnectionFailedError:
                replica.is_up = False  # and so may the next one here
            except asyncio.TimeoutError:
                raise RequestError(
                    f"executor {self.name} did not answer in time", "DEADLINE_EXCEEDED"
                ) from None
            except ServerError as error:
                log.error("a call to executor %s failed: %s", self.name, error)
                raise RequestError(FAILED, "INTERNAL") from None
            finally:
                replica.add_items(-items)
        raise RequestError(
            f"no replica of executor {self.name} is ready: try again in a moment",
            "UNAVAILABLE",
            retry_after=_RETRY_AFTER_SECONDS,
        )

    async def watch(self) -> None:
        """Follows the death, the silence and the return of each replica, until cancelled."""
        await asyncio.gather(self._pass_over_silent(), *map(self._look_at, self._replicas))

    async def _look_at(self, replica: _Replica) -> None:
        while True:
            try:
                await replica.send_copy(self.probe)
                replica.is_up = True
            except ClientClosedError:
                pass  # it is silent
            except ConnectionFailedError:
                replica.is_up = False
            except ServerError:
                replica.is_up = True  # an answer, though not of clip.v1
            await asyncio.sleep(_LOOK_SECONDS)

    async def _pass_over_silent(self) -> None:
        """Lets requests on replicas that turn silent move to those that answer."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            for replica in self._replicas:
                replica.listen()
            if self.can_answer:
                for replica in self._replicas:
                    if replica.is_silent and replica.own_items:
                        log.warning("replica %s does not answer: passed over", replica.address)
                        await replica.break_off()

    async def send_to_each(self, request: pb.Request) -> list[pb.Response]:
        """The responses of all replicas, once each of them answers."""

        async def ask(replica: _Replica) -> pb.Response:
            while True:
                try:
                    return await replica.send_copy(request)
                except ConnectionFailedError:
                    await asyncio.sleep(_RETRY_SECONDS)  # not yet

        return await asyncio.gather(*map(ask, self._replicas))

    async def counts(self) -> Counts:
        """What the replicas count of items."""
        found: dict[str, dict[str, float]] = {}

        async def ask(replica: _Replica) -> None:
            with contextlib.suppress(*_SILENCE):
                request = pb.Request(metrics=pb.MetricsRequest())
                answer = await asyncio.wait_for(replica.transport.send(request), _METRICS_SECONDS)
                found[replica.address.target] = dict(answer.metrics.counts)

        await asyncio.gather(*(ask(each) for each in self._replicas if each.can_answer))
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
    deployments: Mapping[str, Any],
    timeout: float | None,
    timed: TimeCall = untimed,
    silence_seconds: float = SILENCE_SECONDS,
    counts: SharedCounts | None = None,
) -> list[ReplicaPool]:
    """A pool for each executor, from the gRPC addresses that Jina hands to a gateway.

    timeout, timed, silence_seconds, counts: see ReplicaPool.
    """
    return [
        ReplicaPool(
            name,
            addresses if isinstance(addresses, list) else addresses["grpc"],
            timeout,
            timed,
            silence_seconds,
            counts,
        )
        for name, addresses in deployments.items()
    ]
