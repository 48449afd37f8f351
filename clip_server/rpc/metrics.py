"""Prometheus metrics that cost a request little, and those of replicas as clip.v1 carries them.

The counters and histograms of prometheus_client lock each of their numbers, which with a handful of
them was a tenth of what a small request costs a process. These are for one thread.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

# Buckets of the histograms of time, in seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Count:
    """A number that grows."""

    def __init__(self) -> None:
        self.value = 0

    def inc(self, number: int = 1) -> None:
        """Increases it."""
        self.value += number


class Distribution:
    """How often numbers up to each bound were observed."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts, self._sum = [0] * (len(bounds) + 1), 0.0

    def observe(self, number: float) -> None:
        """Takes a number into account."""
        self._counts[bisect_left(self._bounds, number)] += 1
        self._sum += number

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Adds it to a family, with these values of its labels."""
        names = map(floatToGoString, (*self._bounds, math.inf))
        counts = itertools.accumulate(self._counts)
        family.add_metric(labels, [*zip(names, counts, strict=True)], self._sum)


_Child = TypeVar("_Child", Count, Distribution)


class _Parent(Collector, Generic[_Child]):
    """A metric: what it counts, for each combination of its labels' values."""

    def __init__(
        self,
        name: str,
        documentation: str,
        registry: CollectorRegistry,
        labels: Sequence[str] = (),
    ) -> None:
        self._described = name, documentation
        self._labels = labels
        self._children: dict[tuple[str, ...], _Child] = {}
        registry.register(self)

    def of(self, *values: str) -> _Child:
        """What it counts for these values of the labels."""
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._new()
        return child

    def _new(self) -> _Child:
        raise NotImplementedError


class Counter(_Parent[Count]):
    """A counter."""

    def _new(self) -> Count:
        return Count()

    def collect(self) -> Iterator[Metric]:
        """Yields it as Prometheus has it."""
        family = CounterMetricFamily(*self._described, labels=self._labels)
        for values, count in self._children.items():
            family.add_metric(values, count.value)
        yield family


class Histogram(_Parent[Distribution]):
    """A histogram.

    bounds: of the numbers that are counted together, ascending.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        registry: CollectorRegistry,
        labels: Sequence[str] = (),
        bounds: Sequence[float] = SECONDS,
    ) -> None:
        super().__init__(name, documentation, registry, labels)
        self._bounds = bounds

    def _new(self) -> Distribution:
        return Distribution(self._bounds)

    def collect(self) -> Iterator[Metric]:
        """Yields it as Prometheus has it."""
        family = HistogramMetricFamily(*self._described, labels=self._labels)
        for values, distribution in self._children.items():
            distribution.add_to(family, values)
        yield family


def to_text(registry: CollectorRegistry) -> str:
    """The metrics of a registry in Prometheus's text format."""
    return generate_latest(registry).decode()


def read_text(text: str, labels: Mapping[str, str]) -> Iterator[Metric]:
    """The metrics in a text, with labels added where a sample has none of that name."""
    for family in text_string_to_metric_families(text):
        family.samples = [
            sample._replace(labels={**labels, **sample.labels}) for sample in family.samples
        ]
        yield family


def merged(families: Iterable[Metric]) -> Iterable[Metric]:
    """One family for each name, with the samples of all of that name.

    Prometheus's text format allows a name once. The times at which counters were created, which
    only OpenMetrics knows, are dropped.
    """
    found: dict[str, Metric] = {}
    for family in families:
        first = found.setdefault(family.name, family)
        if first is not family:
            first.samples += family.samples
        first.samples = [each for each in first.samples if not each.name.endswith("_created")]
    return [family for family in found.values() if family.samples]
