"""Observes requests of all protocols: their ids, metrics and lines in the access log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from random import getrandbits
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server import logs
from clip_server.gateway.access import caller_name
from clip_server.gateway.metrics import GatewayMetrics
from clip_server.launch.tracing import span
from clip_server.rpc.items import count_items
from clip_server.rpc.multiplexing import Call

log = logging.getLogger("clip_server.access")

REQUEST_ID, TRACEPARENT = "x-request-id", "traceparent"
_LONGEST_ID = 128
# Of an endpoint in logs and traces, which may be any path.
_LONGEST_ENDPOINT = 256
# The label of endpoints that no executor names, of which clients can send any number.
_OTHER = "other"


@dataclass
class Caller:
    """Where requests come from, as the transport says it.

    client: the address.
    request_id, traceparent: as its headers or metadata name them; "": they do not.
    """

    protocol: str
    client: str = ""
    request_id: str = ""
    traceparent: str = ""


@dataclass
class Observed:
    """A request in flight. Whoever learns more of it on its way completes this.

    code: OK, or that of the error in the answer.
    status: of HTTP; 0: another protocol.
    items: texts and images in it.
    is_envelope: it carries requests that are observed by themselves, and is not counted.
    """

    caller: Caller
    endpoint: str
    request_id: str
    traceparent: str
    code: str = "OK"
    status: int = 0
    items: int = 0
    is_envelope: bool = False

    def rename(self, request_id: str) -> None:
        """Takes the id in the request itself, unless the transport already named one."""
        if not self.caller.request_id and is_request_id(request_id):
            self.request_id = request_id
            logs.request_id.set(request_id)


caller: ContextVar[Caller] = ContextVar("caller")
_current: ContextVar[Observed | None] = ContextVar("observed", default=None)


def current() -> Observed | None:
    """The request that the current task works on; None: it works on none."""
    return _current.get()


class Observer:
    """Observes the requests of a gateway.

    metrics: where they are counted.
    endpoints: that are named in metrics.
    tracer: of OpenTelemetry; None: requests are not traced.
    """

    def __init__(
        self, metrics: GatewayMetrics, endpoints: Collection[str], tracer: Any = None
    ) -> None:
        self.metrics, self._tracer = metrics, tracer
        self._endpoints = frozenset(endpoints)
        self._logs_access = logs.has_access_log()

    def request(
        self, endpoint: str, request_id: str = "", traceparent: str = ""
    ) -> AbstractContextManager[Observed]:
        """Observes a request of the current `caller` until the end of the context.

        request_id, traceparent: in the request itself; "": those of the caller.
        """
        sender = caller.get()
        taken = request_id or sender.request_id
        observed = Observed(
            sender,
            endpoint,
            taken if is_request_id(taken) else f"{getrandbits(128):032x}",
            traceparent or sender.traceparent,
        )
        observing = _Observing(observed, self._end)
        return self._traced(observing) if self._tracer else observing

    @contextmanager
    def _traced(self, observing: _Observing) -> Iterator[Observed]:
        with observing as observed:
            attributes = {
                "protocol": observed.caller.protocol,
                "request_id": observed.request_id,
            }
            with span(self._tracer, observed.endpoint, observed.traceparent, **attributes):
                yield observed

    def observing(self, call: Call) -> Call:
        """`call` for the requests of a stream, each of them observed."""

        async def observed_call(request: pb.Request) -> pb.Response:
            endpoint = f"/{request.WhichOneof('body')}"
            with self.request(endpoint, request.request_id, request.traceparent) as observed:
                answer = call(request)
                del request  # see `ReplicaPool.send`
                response = await answer
                response.request_id = observed.request_id
                if response.HasField("error"):
                    observed.code = pb.Error.Code.Name(response.error.code)
                return response

        return observed_call

    def _end(self, observed: Observed, seconds: float) -> None:
        if observed.is_envelope:
            return
        sender = observed.caller
        endpoint = self._named(observed.endpoint)
        self.metrics.observe(sender.protocol, endpoint, observed.code, seconds)
        if self._logs_access:
            fields = {
                "protocol": sender.protocol,
                "endpoint": observed.endpoint[:_LONGEST_ENDPOINT],
                "status": observed.status or observed.code,
                "items": observed.items,
                "duration_ms": round(seconds * 1e3, 2),
                "client": sender.client,
                "key": caller_name(),
            }
            words = " ".join(f"{name}={value}" for name, value in fields.items() if value != "")
            # The log's own format names the request.
            extra = {"fields": fields, "request_id": observed.request_id}
            log.info(words, extra=extra)

    def _named(self, endpoint: str) -> str:
        """An endpoint as metrics name it; with a model's name after it, as without."""
        first = "/" + endpoint[1:].partition("/")[0]
        known = (each for each in (endpoint, first) if each in self._endpoints)
        return next(known, _OTHER)


class _Observing:
    """The context in which a request is observed. A generator would take twice as long.

    end: called with the request and its seconds.
    """

    def __init__(self, observed: Observed, end: Callable[[Observed, float], None]) -> None:
        self._observed, self._end_observed = observed, end

    def __enter__(self) -> Observed:
        observed = self._observed
        self._outer = _current.set(observed), logs.request_id.set(observed.request_id)
        self._started = time.perf_counter()
        return observed

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        seconds = time.perf_counter() - self._started
        if kind is asyncio.CancelledError:
            self._observed.code = "CANCELLED"
        current, request_id = self._outer
        _current.reset(current)
        logs.request_id.reset(request_id)
        self._end_observed(self._observed, seconds)


def note_request(request: pb.Request) -> None:
    """Passes the id of the current request on in `request`, and counts the items in it."""
    observed = current()
    if observed is not None:
        observed.items += count_items(request) or 0
        request.request_id = observed.request_id
        request.traceparent = observed.traceparent


def join_host_port(address: Any) -> str:
    """The address of a client, as asyncio has it, in one string."""
    if not address:
        return ""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_request_id(text: str) -> bool:
    """Whether a text can name a request in logs and headers."""
    return 0 < len(text) <= _LONGEST_ID and text.isascii() and text.isprintable()
