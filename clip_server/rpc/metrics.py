"""Prometheus metrics of replicas, as clip.v1 carries them to the gateway."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

# Buckets of the histograms of time, in seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


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
