"""Answers clip.v1 by the executors of the flow, and refuses more than the gateway can hold."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from prometheus_client import Metric

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway import documents
from clip_server.gateway.admission import Work
from clip_server.gateway.collection import KINDS, Collection
from clip_server.gateway.early_refusal import note_work
from clip_server.gateway.jina_protocol import JinaRequestHandler
from clip_server.gateway.observation import note_request
from clip_server.gateway.topology import FlowExecutor, Route, Topology
from clip_server.launch.gateway_group import SharedCounts
from clip_server.rpc.errors import check_count, error_response
from clip_server.rpc.items import items_to_encode

# The name of their number, of requests in flight.
_BYTES = "bytes of requests"


class Router:
    """Sends each request straight to its encoder, or through the flow if others take part.

    topology: the executors.
    jina: sends requests through the flow.
    collection: answers those on the flow's collection; None: it has none.
    max_queued_bytes: of requests in flight; beyond it, more are refused.
    counts: those bytes, also of other gateways.
    """

    def __init__(
        self,
        topology: Topology,
        jina: JinaRequestHandler,
        collection: Collection | None,
        max_queued_bytes: int,
        counts: SharedCounts,
    ) -> None:
        self._topology, self._jina = topology, jina
        self.collection = collection
        self._max_queued_bytes = max_queued_bytes
        self._counts = counts

    async def watch(self) -> None:
        """Measures the encoders' rates, for ever."""
        await asyncio.gather(*(each.backlog.watch() for each in self._topology.encoders))

    @property
    def max_request_items(self) -> int:
        """Items that the first encoder takes in one request."""
        info = self._topology.encoder().info
        return info.max_request_items if info else 0

    @property
    def encoders(self) -> Sequence[FlowExecutor]:
        """The encoders, in the order of the flow."""
        return self._topology.encoders

    def encoder(self, model: str = "") -> FlowExecutor:
        """The encoder of this name, as `Topology.encoder` finds it."""
        return self._topology.encoder(model)

    def route(self, endpoint: str, model: str = "", target: str = "") -> Route:
        """The way of a request, as `Topology.route` finds it."""
        return self._topology.route(endpoint, model, target)

    def binds(self, endpoint: str) -> bool:
        """Whether an executor answers `endpoint` by name, as `Topology.binds`."""
        return self._topology.binds(endpoint)

    async def call(self, request: pb.Request) -> pb.Response:
        """The response to `request`; an error on the way to the executor is in it too."""
        started, request_id, size = time.perf_counter(), request.id, request.ByteSize()
        self._counts.add(_BYTES, size)
        note_request(request)
        try:
            self._refuse_if_full(size)
            async with self._hold(request):
                sending = self._send(request)
                del request  # see `ReplicaPool.send`
                response = await sending
            response.id = request_id
        except RequestError as error:
            response = error_response(request_id, error)
        finally:
            self._counts.add(_BYTES, -size)
        kind = response.WhichOneof("body")
        if kind in ("encode", "rank", "index", "search"):
            timings = getattr(response, kind).timings
            timings.gateway = (time.perf_counter() - started) * 1e3 - timings.total
        return response

    async def metrics(self) -> list[Metric]:
        """Metrics of the replicas of all encoders, and of the indexer."""
        asked = [
            each.pool.metrics(each.info.model if each.info else "")
            for each in self._topology.encoders
        ]
        if self.collection:
            asked.append(self.collection.indexer.metrics())
        return [*itertools.chain.from_iterable(await asyncio.gather(*asked))]

    def _hold(self, request: pb.Request) -> AbstractAsyncContextManager[None]:
        """Counts what a request has to be encoded as in flight.

        Raises:
            RequestError: they are too many, or would wait for too long.
        """
        items = items_to_encode(request)
        if items is None:
            return nullcontext()
        model = getattr(getattr(request, str(request.WhichOneof("body"))), "model", "")
        encoder = self._topology.encoder(model)
        if encoder.info:
            check_count(len(items), encoder.info.max_request_items)
        backlog, work = encoder.backlog, Work.of(items)
        note_work(backlog, work)
        return backlog.hold(work)

    async def _send(self, request: pb.Request) -> pb.Response:
        kind = request.WhichOneof("body")
        if kind in KINDS:
            return await self._on_collection(request)
        model = getattr(getattr(request, kind), "model", "") if kind else ""
        if kind not in ("encode", "rank"):
            response = await self._topology.encoder(model).pool.send(request)
            if self.collection is not None and response.HasField("info"):
                response.info.collection.CopyFrom(await self.collection.describe())
            return response
        route = self._topology.route(f"/{kind}", model)
        if route.is_direct and route.encoder:
            sending = route.encoder.pool.send(request)
            del request  # see `ReplicaPool.send`
            return await sending
        seconds = request.timeout / 1e3 or None
        try:
            if kind == "encode":
                encoded = self._encode(request.encode)
                return pb.Response(encode=await asyncio.wait_for(encoded, seconds))
            return pb.Response(rank=await asyncio.wait_for(self._rank(request.rank), seconds))
        except asyncio.TimeoutError:
            raise RequestError("the flow did not answer in time", "DEADLINE_EXCEEDED") from None

    async def _on_collection(self, request: pb.Request) -> pb.Response:
        if self.collection is None:
            raise RequestError(
                "this flow has no CLIPIndexer: serve search-flow.yml, see docs/search.md"
            )
        return await self.collection.call(request)

    async def _encode(self, request: pb.EncodeRequest) -> pb.EncodeResponse:
        check_count(len(request.items), self.max_request_items)
        docs = documents.encode_documents(request)
        parameters = {
            "normalize": request.options.normalize,
            "minibatch_size": request.options.minibatch_size,
            "model_name": request.model,
        }
        answered = await self._jina.post("/encode", docs, parameters)
        info = self._topology.encoder(request.model).info
        return documents.encode_response(docs, answered, info.dim if info else 0)

    async def _rank(self, request: pb.RankRequest) -> pb.RankResponse:
        check_count(len(request.candidates) + 1, self.max_request_items)
        docs = documents.rank_documents(request)
        answered = await self._jina.post("/rank", docs, {"model_name": request.model})
        return documents.rank_response(docs[0], answered)

    def _refuse_if_full(self, size: int) -> None:
        # One that is larger than the bound is taken by an idle server.
        in_flight = self._counts.total(_BYTES)
        if self._max_queued_bytes < in_flight != size:
            raise RequestError(
                f"the server is full: requests of {in_flight / 2**20:,.0f} MiB are in flight, and "
                f"it takes {self._max_queued_bytes / 2**20:,.0f} MiB at most; try again in a "
                "moment",
                "RESOURCE_EXHAUSTED",
                retry_after=1.0,
            )
