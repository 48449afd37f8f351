"""clip.v1 on top of a store: one request message in, one response message out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
from google.protobuf import json_format
from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector

from clip_client.proto import clip_pb2 as pb
from clip_client.tags import tags_to_dict
from clip_server import __version__
from clip_server.errors import ConfigurationError, RequestError
from clip_server.rpc.errors import FAILED, check_count, error_response
from clip_server.rpc.items import content_id, read_embeddings
from clip_server.rpc.metrics import to_text
from clip_server.search import filters, open_store
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.relevance import Background
from clip_server.search.store import Hit, Modality, Query, Row, Settings, Store, Target, Vectors

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_ID = 1024
MOST_HITS = 10_000
_SEARCH_THREADS = 4
# Rows of several requests that are written in one transaction.
_WRITTEN_TOGETHER = 4096
_TARGETS: dict[int, Target] = {pb.BOTH: "both", pb.TEXTS: "texts", pb.IMAGES: "images"}


class SearchService:
    """Answers clip.v1 requests on one collection. Use it from one event loop.

    limit: hits of a query that does not say how many.
    threshold: the least score (with L2 the greatest distance) of a query that names none.
    max_request_items: of one request.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        limit: int = 10,
        threshold: float | None = None,
        max_request_items: int = 10_000,
    ) -> None:
        self._settings = settings
        self._limit, self._threshold = limit, threshold
        self._max_request_items = max_request_items
        self._store: Store | None = None
        self._background: Background | None = None
        self._searching = ThreadPoolExecutor(_SEARCH_THREADS, "search")
        self._writing = ThreadPoolExecutor(1, "write")
        self._unwritten: deque[tuple[list[Row], asyncio.Future[None]]] = deque()
        self._write_task: asyncio.Task[None] | None = None
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._rows_indexed = Counter(
            "clip_rows_indexed", "Rows stored in the collection", registry=self._registry
        )
        self._rows_deleted = Counter(
            "clip_rows_deleted", "Rows deleted from the collection", registry=self._registry
        )
        self._searches = Counter(
            "clip_searches", "Queries answered from the collection", registry=self._registry
        )
        self._rows = Gauge(
            "clip_collection_rows", "Rows in the collection", registry=self._registry
        )

    async def handle(self, request: pb.Request) -> pb.Response:
        """The response to `request`; an error is in it too."""
        response = pb.Response(id=request.id)
        kind = request.WhichOneof("body")
        answer = self._answers().get(kind or "")
        try:
            if answer is None:
                raise RequestError(
                    f"an indexer answers {', '.join(self._answers())}, not {kind or 'nothing'}"
                )
            getattr(response, str(kind)).CopyFrom(await answer(getattr(request, str(kind))))
        except RequestError as error:
            return error_response(request.id, error)
        except Exception:
            log.exception("a request failed")
            return error_response(request.id, RequestError(FAILED, "INTERNAL"))
        return response

    def _answers(self) -> dict[str, Callable[[Any], Any]]:
        return {
            "index": self.index,
            "search": self.search,
            "delete": self.delete,
            "count": self.count,
            "info": self._info,
            "metrics": self._measure,
            "open": self.open,
        }

    def close(self) -> None:
        """Closes the collection, when what is being written is on disk."""
        self._writing.shutdown()
        self._searching.shutdown()
        if self._store is not None:
            self._store.close()

    async def open(self, request: pb.OpenRequest) -> pb.OpenResponse:
        """Opens the collection, once, for the model that the flow's encoder serves."""
        model = Fingerprint(
            request.model,
            request.dim,
            request.precision,
            tuple(np.frombuffer(request.probes, "<f4").tolist()),
        )
        try:
            if self._store is None:
                self._store = await self._run(self._writing, open_store, self._settings, model)
                self._background = Background(self._store, self._settings.metric)
            elif difference := self._store.model.difference(model):
                raise ConfigurationError(f"the collection is of another model: {difference}")
        except ConfigurationError as error:
            raise RequestError(str(error)) from None
        return pb.OpenResponse(collection=await self._describe())

    async def index(self, request: pb.IndexRequest) -> pb.IndexResponse:
        """Stores items with their embeddings."""
        started = time.perf_counter()
        store = self._opened()
        check_count(len(request.items), self._max_request_items)
        embeddings = read_embeddings(request.embeddings, len(request.items), store.model.dim)
        ids, rows, errors = [], [], []
        for index, (item, embedding) in enumerate(zip(request.items, embeddings, strict=True)):
            try:
                rows.append(_row(item, embedding))
                ids.append(rows[-1].id)
            except RequestError as error:
                errors.append(pb.ItemError(index=index, message=str(error)))
                ids.append("")
        await self._upsert(rows)
        self._rows_indexed.inc(len(rows))
        return pb.IndexResponse(ids=ids, errors=errors, timings=_timings(started))

    async def search(self, request: pb.SearchRequest) -> pb.SearchResponse:
        """The hits of each query."""
        started = time.perf_counter()
        store = self._opened()
        check_count(len(request.queries), self._max_request_items)
        queries = read_embeddings(request.embeddings, len(request.queries), store.model.dim)
        threshold = self._threshold
        if request.HasField("score_threshold"):
            threshold = request.score_threshold
        query = Query(
            limit=_limit(request.limit or self._limit),
            target=_target(request.target),
            filter=filters.parse_json(request.filter),
            threshold=threshold,
        )
        least = request.min_relevance if request.HasField("min_relevance") else None
        # A query without an embedding failed before it came here.
        good = [row for row in range(len(queries)) if not np.isnan(queries[row]).any()]
        found = []
        if good:
            modalities = [_modality(request.queries[row]) for row in good]
            found = await self._run(
                self._searching, self._find, queries[good], modalities, query, least
            )
        results = [pb.Hits() for _ in queries]
        for row, hits in zip(good, found, strict=True):
            results[row].hits.extend(hits)
        self._searches.inc(len(good))
        return pb.SearchResponse(
            results=results, timings=_timings(started), metric=self._settings.metric
        )

    async def delete(self, request: pb.DeleteRequest) -> pb.DeleteResponse:
        """Removes rows."""
        store = self._opened()
        condition = filters.parse_json(request.filter)
        if condition is None and not request.ids:
            raise RequestError("to delete, name ids or a filter")
        if condition is not None and request.ids:
            raise RequestError("to delete, name ids or a filter, not both")
        remove = (
            partial(store.delete, list(request.ids))
            if condition is None
            else partial(store.delete_matching, condition)
        )
        count = await self._run(self._writing, remove)
        self._rows_deleted.inc(count)
        return pb.DeleteResponse(count=count)

    async def count(self, request: pb.CountRequest) -> pb.CountResponse:
        """The number of rows."""
        condition, target = filters.parse_json(request.filter), _target(request.target)
        counted = await self._run(self._searching, self._opened().count, condition, target)
        return pb.CountResponse(count=counted)

    async def _info(self, _: pb.InfoRequest) -> pb.InfoResponse:
        # An empty collection all the same: it tells the gateway what this executor is.
        collection = await self._describe() if self._store else pb.Collection()
        return pb.InfoResponse(
            version=__version__, max_request_items=self._max_request_items, collection=collection
        )

    async def _measure(self, _: pb.MetricsRequest) -> pb.MetricsResponse:
        if self._store is not None:
            self._rows.set((await self._describe()).rows)
        return pb.MetricsResponse(text=to_text(self._registry))

    async def _describe(self) -> pb.Collection:
        described = await self._run(self._searching, self._opened().describe)
        return pb.Collection(**vars(described))

    def _opened(self) -> Store:
        if self._store is None:
            raise RequestError(
                "the collection is not open yet: try again in a moment", "UNAVAILABLE"
            )
        return self._store

    async def _upsert(self, rows: list[Row]) -> None:
        """Stores rows, with those of other requests that wait: each write to the disk costs."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwritten.append((rows, written))
        if self._write_task is None or self._write_task.done():
            # A task of its own: a request that is cancelled leaves the others' rows.
            self._write_task = asyncio.create_task(self._write_all())
        await written

    async def _write_all(self) -> None:
        while self._unwritten:
            together: list[tuple[list[Row], asyncio.Future[None]]] = []
            rows: list[Row] = []
            while self._unwritten and len(rows) < _WRITTEN_TOGETHER:
                together.append(self._unwritten.popleft())
                rows += together[-1][0]
            error: Exception | None = None
            try:
                await self._run(self._writing, self._opened().upsert, rows)
            except Exception as failed:
                error = failed
            for _, written in together:
                if written.done():  # its request was cancelled
                    continue
                if error is None:
                    written.set_result(None)
                else:
                    written.set_exception(error)

    def _find(
        self,
        queries: Vectors,
        modalities: Sequence[Modality | None],
        query: Query,
        least: float | None,
    ) -> list[list[pb.Hit]]:
        assert self._background is not None
        found = []
        all_hits = self._opened().search(queries, query)
        for embedding, modality, hits in zip(queries, modalities, all_hits, strict=True):
            relevances = self._background.relevances(embedding, modality, hits)
            found.append(
                [
                    _message(hit, relevance)
                    for hit, relevance in zip(hits, relevances, strict=True)
                    if least is None or relevance is None or relevance >= least
                ]
            )
        return found

    @staticmethod
    async def _run(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def _modality(query: pb.Item) -> Modality | None:
    """The modality of a query; None where only its embedding is known."""
    if query.WhichOneof("content") is None:
        return None
    return "text" if query.HasField("text") else "image"


def _row(item: pb.Item, embedding: Vectors) -> Row:
    """The row of an item. Raises RequestError where it is unfit."""
    row_id = item.id or item.source
    if len(item.id) > LONGEST_ID:
        raise RequestError(f"the id has more than {LONGEST_ID:,} characters")
    if not row_id or len(row_id) > LONGEST_ID:
        row_id = content_id(item.source or item.text or item.image)
    if not np.isfinite(embedding).all() or not embedding.any():
        raise RequestError("the embedding is zero, or holds a value that is not a number")
    try:
        tags = tags_to_dict(item.tags)
    except (json_format.Error, ValueError):
        raise RequestError("the tags hold a number that is not finite") from None
    is_text = item.HasField("text")
    return Row(
        row_id,
        "text" if is_text else "image",
        embedding,
        item.text if is_text else None,
        item.source or None,
        tags,
    )


def _message(hit: Hit, relevance: float | None) -> pb.Hit:
    return pb.Hit(
        id=hit.id,
        score=hit.score,
        relevance=relevance,
        text=hit.text or "",
        source=hit.uri or "",
        tags=hit.tags or None,
        is_image=hit.modality == "image",
    )


def _limit(limit: int) -> int:
    if limit > MOST_HITS:
        raise RequestError(f"limit is {limit:,}; the greatest is {MOST_HITS:,}")
    return limit


def _target(target: int) -> Target:
    if target not in _TARGETS:
        raise RequestError(f"target is {target}, which is none of {', '.join(_TARGETS.values())}")
    return _TARGETS[target]


def _timings(started: float) -> pb.Timings:
    return pb.Timings(search=(time.perf_counter() - started) * 1e3)
