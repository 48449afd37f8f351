"""OpenTelemetry spans that join a request's client, gateway and executor by W3C's traceparent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_STAGES = ("preprocess", "queue", "inference")


class Timings(Protocol):
    """Milliseconds that an encoder took, as in clip.v1; `inference` includes `queue`."""

    total: float
    preprocess: float
    inference: float
    queue: float


class Trace:
    """A span in progress. traceparent: names it as the parent of others."""

    def __init__(self, tracer: Any, traceparent: str) -> None:
        self._tracer, self.traceparent = tracer, traceparent

    def add_stages(self, timings: Timings) -> None:
        """Adds a span for each stage of a request that has just been answered."""
        durations = (timings.preprocess, timings.queue, timings.inference - timings.queue)
        begun = time.time_ns() - round(timings.total * 1e6)
        for name, milliseconds in zip(_STAGES, durations, strict=True):
            ended = begun + round(milliseconds * 1e6)
            self._tracer.start_span(name, start_time=begun).end(ended)
            begun = ended


@contextmanager
def span(
    tracer: Any, name: str, traceparent: str = "", **attributes: str | int
) -> Iterator[Trace | None]:
    """Traces what happens in the context.

    tracer: None: nothing is traced.
    traceparent: of the parent; "": the span of the current task, if there is one.
    """
    if tracer is None:
        yield None
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    parent = propagator.extract({"traceparent": traceparent}) if traceparent else None
    with tracer.start_as_current_span(name, context=parent, attributes=attributes):
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        yield Trace(tracer, carrier.get("traceparent", ""))
