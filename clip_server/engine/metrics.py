"""Prometheus metrics of an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from clip_server.models.converted import TOWERS
from clip_server.rpc.metrics import SECONDS

if TYPE_CHECKING:
    from clip_server.engine.engine import Engine, Item

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What an engine counts and measures as it works, and the registry that exports it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.registry = CollectorRegistry()
        self.registry.register(_State(engine))
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests received")
        self.expired_requests = self._counter(
            "expired_requests", "Requests that timed out before their answer"
        )
        self.cancelled_requests = self._counter(
            "cancelled_requests", "Requests that the client cancelled or left before their answer"
        )
        items = Counter(
            "clip_items",
            "Texts and images of admitted requests: computed, cached, deduplicated or failed",
            ["modality"],
            registry=self.registry,
        )
        self._texts, self._images = items.labels("text"), items.labels("image")
        self.failed_items = self._counter("failed_items", "Items that could not be encoded")
        self.deduplicated_items = self._counter(
            "deduplicated_items", "Items that were already in flight, and not computed again"
        )
        self.texts = self._counter("texts", "Texts computed by the model")
        self.images = self._counter("images", "Images computed by the model")
        self.truncated_texts = self._counter(
            "truncated_texts", "Texts that were truncated to the model's context length"
        )
        self.priority_batches = self._counter(
            "priority_batches", "Batches of small requests computed concurrently with a large batch"
        )
        self.preprocess_seconds = Histogram(
            "clip_preprocess_duration_seconds",
            "Time from the arrival of a request at the replica until its last item was tokenized "
            "or decoded, waiting for a thread included",
            registry=self.registry,
            buckets=SECONDS,
        )
        self.queue_seconds = Histogram(
            "clip_queue_duration_seconds",
            "Time from the end of a request's preprocessing until its last item went to the device",
            registry=self.registry,
            buckets=SECONDS,
        )
        inference = Histogram(
            "clip_inference_duration_seconds",
            "Time that the model took for a batch",
            ["modality"],
            registry=self.registry,
            buckets=SECONDS,
        )
        batch_size = Histogram(
            "clip_batch_size",
            "Items of a batch",
            ["modality"],
            registry=self.registry,
            buckets=_BATCH_SIZES,
        )
        self._inference = {image: inference.labels(_modality(image)) for image in (True, False)}
        self._batch_size = {image: batch_size.labels(_modality(image)) for image in (True, False)}

    def set_build_info(self, version: str, fingerprint: str) -> None:
        """Exports what runs. fingerprint: of the model's weights."""
        runtime = self._engine.runtime
        labels = {
            "version": version,
            "model": runtime.card.name,
            "fingerprint": fingerprint,
            "runtime": runtime.name,
            "precision": runtime.precision,
            "device": runtime.device,
        }
        info = Gauge(
            "clip_build_info", "Always 1; the labels say what runs", labels, registry=self.registry
        )
        info.labels(**labels).set(1)

    def counts(self) -> dict[str, float]:
        """What became of items: how fast the engine works, and what it had for free."""
        counters = {
            "texts": self.texts,
            "images": self.images,
            "deduplicated_items": self.deduplicated_items,
            "failed_items": self.failed_items,
        }
        values = {name: each.collect() for name, each in counters.items()}
        return {
            **{name: next(iter(value)).samples[0].value for name, value in values.items()},
            "cache_hits": self._engine.cache.hits,
        }

    def count_items(self, items: Sequence[Item]) -> None:
        """Counts the items of an admitted request; invalid ones fail, and are no text or image."""
        texts = sum(isinstance(item, str) for item in items)
        _add(self._texts, texts)
        if texts < len(items):
            _add(self._images, sum(isinstance(item, bytes) for item in items))

    def count_flaws(self, failed_items: int, truncated_texts: int) -> None:
        """Counts the items of a request that failed, and its texts that were truncated."""
        _add(self.failed_items, failed_items)
        _add(self.truncated_texts, truncated_texts)

    def observe_batch(self, size: int, *, is_image: bool) -> None:
        """Takes a batch that goes to the device into account."""
        self._batch_size[is_image].observe(size)

    def observe_computed(self, size: int, seconds: float, *, is_image: bool) -> None:
        """Takes a batch into account that the model has computed in some seconds."""
        (self.images if is_image else self.texts).inc(size)
        self._inference[is_image].observe(seconds)

    def _counter(self, name: str, documentation: str) -> Counter:
        return Counter(f"clip_{name}", documentation, registry=self.registry)


class _State(Collector):
    """What the engine keeps for its own work, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Nothing: the engine is not complete when this is registered."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yields the current values."""
        engine, cache = self._engine, self._engine.cache
        yield GaugeMetricFamily(
            "clip_queued_items",
            "Items that wait for a preprocessing thread or for the device",
            engine.queued_items,
        )
        yield GaugeMetricFamily(
            "clip_in_flight_items",
            "Items of requests in flight, queued and running",
            engine.in_flight_items,
        )
        loaded = GaugeMetricFamily(
            "clip_tower_loaded",
            "1 if the tower for texts or for images is in memory, 0 if it is unloaded",
            labels=["modality"],
        )
        for tower in TOWERS:
            loaded.add_metric([tower], engine.is_loaded(tower))
        yield loaded
        yield CounterMetricFamily(
            "clip_oom_splits",
            "Batches halved because the device ran out of memory",
            engine.oom_splits,
        )
        yield CounterMetricFamily("clip_cache_hits", "Items found in the cache", cache.hits)
        yield CounterMetricFamily("clip_cache_misses", "Items not found in the cache", cache.misses)
        yield GaugeMetricFamily("clip_cache_bytes", "Size of the cache", cache.bytes)


def _add(counter: Counter, count: int) -> None:
    """Increases a counter. Adding 0, which is common, would cost as much as any number."""
    if count:
        counter.inc(count)


def _modality(is_image: bool) -> str:
    return "image" if is_image else "text"
