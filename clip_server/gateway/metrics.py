"""Prometheus metrics of the gateway, and the page that has those of its replicas too."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from clip_client.proto import clip_pb2 as pb
from clip_server.gateway.siblings import Siblings
from clip_server.launch.gateway_group import GatewayGroup
from clip_server.rpc.metrics import SECONDS, merged, to_text

CONTENT_TYPE = CONTENT_TYPE_LATEST


class GatewayMetrics:
    """What a gateway counts and measures.

    siblings: the other gateways, whose metrics stand next to its own.
    """

    def __init__(self, group: GatewayGroup, number: int) -> None:
        self.siblings = Siblings(group, number, lambda: to_text(self._registry))
        self._connections: dict[str, Callable[[], int]] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_Connections(self._connections))
        ProcessCollector(registry=self._registry)
        self._seconds = Histogram(
            "clip_request_duration_seconds",
            "Time from the arrival of a request at the gateway until its answer",
            ["protocol", "endpoint"],
            registry=self._registry,
            buckets=SECONDS,
        )
        # Finding a child by its labels costs as much as observing.
        self._seconds_of = functools.cache(self._seconds.labels)
        self._errors = Counter(
            "clip_errors",
            "Requests that were answered with an error or cancelled, by its code",
            ["protocol", "code"],
            registry=self._registry,
        )
        self._refused = Counter(
            "clip_refused_requests",
            "Requests refused because the server was full, a key had too many items in flight, or "
            "the request was too large",
            ["protocol"],
            registry=self._registry,
        )

    def add_protocol(self, protocol: str, count_connections: Callable[[], int]) -> None:
        """Begins to export a protocol, with counters at 0: from nothing, none would increase."""
        self._connections[protocol] = count_connections
        self._refused.labels(protocol)
        for code in pb.Error.Code.keys()[1:]:
            self._errors.labels(protocol, code)

    def observe(self, protocol: str, endpoint: str, code: str, seconds: float) -> None:
        """Counts a request that has ended. code: OK, or that of the error."""
        self._seconds_of(protocol, endpoint).observe(seconds)
        if code != "OK":
            self._errors.labels(protocol, code).inc()
        if code == "RESOURCE_EXHAUSTED":
            self._refused.labels(protocol).inc()

    async def exposition(self, of_replicas: Awaitable[Iterable[Metric]]) -> bytes:
        """All metrics in Prometheus's text format."""
        if self.siblings.exist:
            replicas, own = await asyncio.gather(of_replicas, self.siblings.metrics())
        else:
            replicas, own = await of_replicas, [*self._registry.collect()]
        page = CollectorRegistry()
        page.register(_Families(merged([*own, *replicas])))
        return generate_latest(page)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class _Connections(Collector):
    def __init__(self, count: dict[str, Callable[[], int]]) -> None:
        self._count = count

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily("clip_connections", "Open connections", labels=["protocol"])
        for protocol, count in self._count.items():
            family.add_metric([protocol], count())
        yield family
