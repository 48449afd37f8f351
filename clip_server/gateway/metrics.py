"""Metrics of the executors in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# Metrics that go down as well as up; all others only count.
_GAUGES = {"in_flight_items", "cache_bytes", "collection_rows"}


class _Replicas(Collector):
    """A collector of the metrics that replicas report."""

    def __init__(self, values: Mapping[str, Mapping[str, float]]) -> None:
        self._values = values

    def collect(self) -> Iterator[Metric]:
        """Yields a family for each name, with a sample for each replica."""
        names = sorted({name for values in self._values.values() for name in values})
        for name in names:
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            words = name.replace("_", " ")
            family = kind(f"clip_{name}", f"{words} of an executor", labels=["replica"])
            for replica, values in self._values.items():
                if name in values:
                    family.add_metric([replica], values[name])
            yield family


def exposition(values: Mapping[str, Mapping[str, float]]) -> bytes:
    """The metrics of each replica, by its address and their names."""
    registry = CollectorRegistry()
    registry.register(_Replicas(values))
    return generate_latest(registry)
