"""The calls of the Client, each written once as a generator (see sansio.py)."""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_client import inputs
from clip_client.callbacks import Callback, Callbacks
from clip_client.collector import ResultCollector, progress
from clip_client.connection import Connection
from clip_client.documents import candidates_of, descend, is_document_list, returned
from clip_client.errors import InvalidInputError, ItemFailure, ItemsError, TruncationWarning
from clip_client.parameters import Parameters, positive
from clip_client.pipeline import Collector, Encoding, Inputs, iterate
from clip_client.profiling import latencies, show
from clip_client.proto import clip_pb2
from clip_client.ranking import RankCollector
from clip_client.results import Info, Label
from clip_client.row_collector import IndexCollector, RowCollector
from clip_client.sansio import CallGenerator
from clip_client.scores import cosines, logit_bias_of, probabilities
from clip_client.search_parameters import SearchParameters, Target, to_json_filter

T = TypeVar("T")

TIMEOUT = 300.0
PREFETCH = 8
# Documents that the callbacks of `rank` get at a time, by default.
_RANKED_DOCUMENTS = 8


class RequestOptions(TypedDict, total=False):
    """The options of every call with callbacks that do not change what it returns."""

    batch_size: SupportsIndex | None
    prefetch: SupportsIndex
    show_progress: bool
    on_always: Callback | None
    timeout: float | None


class IndexOptions(RequestOptions, total=False):
    """The options of `index` that do not change what it returns."""

    ids: Iterable[Any] | None
    tags: Iterable[Mapping[str, Any]] | None


class SearchOptions(RequestOptions, total=False):
    """The options of `search` that do not change what it returns."""

    limit: SupportsIndex | None
    filter: Mapping[str, Any] | str | None
    target: Target
    score_threshold: float | None
    min_relevance: float | None
    parameters: Mapping[str, Any] | None


class RankOptions(RequestOptions, total=False):
    """The options of `rank` that do not change what it returns."""

    model: str | None
    parameters: Mapping[str, Any] | None
    on_error: Callback | None


class EncodeOptions(RankOptions, total=False):
    """The options of `encode` that do not change what it returns."""

    normalize: bool | None


@dataclass(frozen=True)
class Sending:
    """Options for sending the items of a call."""

    batch_size: int | None = None
    prefetch: int = PREFETCH
    timeout: float | None = TIMEOUT

    @classmethod
    def of(
        cls, batch_size: SupportsIndex | None, prefetch: SupportsIndex, timeout: float | None
    ) -> Sending:
        """From the arguments of a call. Raises InvalidInputError."""
        size = None if batch_size is None else positive("batch_size", batch_size)
        return cls(size, positive("prefetch", prefetch), timeout)


def encode(
    server: Connection,
    items: Any,
    *,
    batch_size: SupportsIndex | None,
    prefetch: SupportsIndex,
    show_progress: bool,
    normalize: bool | None,
    model: str | None,
    parameters: Mapping[str, Any] | None,
    on_item_error: str | None,
    callbacks: Callbacks,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.encode`."""
    policy = _item_policy(on_item_error, callbacks)
    given = Parameters.parse(parameters, normalize, model)
    sending = Sending.of(batch_size, prefetch, timeout)
    raw_items = iterate(items)
    roots: list[Any] | None = None
    if given.descends:
        roots = [] if callbacks.on_done is None else None
        raw_items = _descended(raw_items, given.access_paths, roots)
    with progress(show_progress, items) as advance:
        collector = ResultCollector(callbacks, given, advance)
        try:
            template = _encode_template(given)
            yield from _encoding(server, collector, sending, template).run(raw_items)
            dim = collector.dim
            if collector.keeps and not dim and not collector.handled:
                dim = (yield from info(server, timeout, given.model)).dim
        except Exception as error:
            if collector.keeps:
                # Of an exception of the user's own too, such as a generator's.
                error.__dict__["embeddings"] = collector.computed(items)
            raise
    embeddings = collector.embeddings(dim) if collector.keeps else None
    result: Any = embeddings
    if collector.keeps:
        documents = roots if given.descends else collector.documents
        if documents is not None or is_document_list(items):
            result = returned(items, documents or [])
    _warn(collector.truncated)
    return _finish(result, collector.failures, collector.total, policy, embeddings)


def rank(
    server: Connection,
    query: Any,
    candidates: Any,
    *,
    source: str,
    batch_size: SupportsIndex | None,
    prefetch: SupportsIndex,
    show_progress: bool,
    model: str | None,
    parameters: Mapping[str, Any] | None,
    on_item_error: str | None,
    callbacks: Callbacks,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.rank`."""
    policy = _item_policy(on_item_error, callbacks)
    given = Parameters.parse(parameters, model=model)
    sending = Sending.of(batch_size, prefetch, timeout)
    items = query if candidates is None else candidates
    roots: list[Any] | None = [] if candidates is None and callbacks.on_done is None else None
    groups: Iterator[tuple[Any, list[Any], Any]]
    if candidates is None:
        chosen = _descended_now(_synchronous(items), given.access_paths, roots)
        groups = ((each, candidates_of(each, source), each) for each in chosen)
    else:
        groups = iter([(query, list(_synchronous(items)), None)])
    info_answer = server.send(_info_request(given.model), timeout)
    with progress(show_progress, items) as advance:
        collector = RankCollector(
            info_answer, callbacks, given, advance, source, sending.batch_size or _RANKED_DOCUMENTS
        )
        if candidates is None:  # of Documents, whose items are sent as they fit
            sending = replace(sending, batch_size=None)
        template = _encode_template(given)
        encoding = _encoding(server, collector, sending, template, first=info_answer)
        yield from encoding.run(collector.items_of(groups))
        collector.finish()
    result: Any = None
    if roots is not None:
        result = returned(query, roots)
    elif collector.keeps:
        result = collector.rankings
    _warn(collector.truncated)
    return _finish(result, collector.failures, collector.total, policy)


def classify(
    server: Connection,
    images: Any,
    labels: Sequence[str],
    *,
    prompt: str,
    model: str | None,
    on_item_error: str | None,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.classify`."""
    policy = _item_policy(on_item_error)
    if isinstance(labels, str) or not labels:
        raise InvalidInputError("labels is a list of at least one str")
    if "{}" not in prompt:
        raise InvalidInputError(f"the prompt {prompt!r} has no {{}} for the label to go")
    images = _as_images(iterate(images, "classify"))
    given = Parameters.parse(None, model=model)
    prompts = [{"text": prompt.replace("{}", label)} for label in labels]
    targets, collector, info = yield from _embedded(server, iter(prompts), given, timeout)
    for failure in collector.failures:
        raise InvalidInputError(f"label {labels[failure.index]!r}: {failure.message}")
    truncated = collector.truncated
    queries, collector, _ = yield from _embedded(server, images, given, timeout)
    failed = {failure.index for failure in collector.failures}
    cosine = cosines(queries, targets)
    scores = probabilities(cosine, info.logit_scale, logit_bias_of(info))
    results = [
        None
        if row in failed
        else [
            Label(labels[best], score, float(cosine[row, best]))
            for best, score in _best_first(scores[row])
        ]
        for row in range(len(queries))
    ]
    _warn(truncated)
    return _finish(results, collector.failures, len(results), policy)


def index(
    server: Connection,
    items: Any,
    *,
    ids: Iterable[Any] | None,
    tags: Iterable[Mapping[str, Any]] | None,
    batch_size: SupportsIndex | None,
    prefetch: SupportsIndex,
    show_progress: bool,
    on_item_error: str | None,
    callbacks: Callbacks,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.index`."""
    with progress(show_progress, items, "indexing") as advance:
        collector = IndexCollector(callbacks, advance, ids, tags)
        template = clip_pb2.Request(index=clip_pb2.IndexRequest())
        sending = Sending.of(batch_size, prefetch, timeout)
        return (
            yield from _on_rows(server, collector, items, template, sending, on_item_error, "index")
        )


def search(
    server: Connection,
    queries: Any,
    *,
    parameters: SearchParameters,
    batch_size: SupportsIndex | None,
    prefetch: SupportsIndex,
    show_progress: bool,
    on_item_error: str | None,
    callbacks: Callbacks,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.search`."""
    with progress(show_progress, queries, "searching") as advance:
        collector = RowCollector(callbacks, advance)
        template = clip_pb2.Request(search=parameters.to_request())
        sending = Sending.of(batch_size, prefetch, timeout)
        return (
            yield from _on_rows(
                server, collector, queries, template, sending, on_item_error, "search"
            )
        )


def delete(
    server: Connection, ids: Iterable[str] | None, condition: Any, timeout: float | None
) -> CallGenerator[int]:
    """`Client.delete`."""
    if isinstance(ids, str):
        raise TypeError(f"pass several ids, not one: delete([{ids!r}])")
    named = [str(each) for each in ids or ()]
    if ids is not None and not named:
        return 0
    request = clip_pb2.DeleteRequest(ids=named, filter=to_json_filter(condition))
    response: clip_pb2.Response = yield server.send(clip_pb2.Request(delete=request), timeout)
    return response.delete.count


def count(
    server: Connection, condition: Any, target: str, timeout: float | None
) -> CallGenerator[int]:
    """`Client.count`."""
    parameters = SearchParameters(filter=condition, target=target).to_request()
    request = clip_pb2.CountRequest(filter=parameters.filter, target=parameters.target)
    response: clip_pb2.Response = yield server.send(clip_pb2.Request(count=request), timeout)
    return response.count.count


def profile(
    server: Connection, content: Any, timeout: float | None
) -> CallGenerator[dict[str, float]]:
    """`Client.profile`."""
    item = inputs.to_item(content or "a text")
    if not isinstance(item, clip_pb2.Item):
        item = yield server.read(item)
    for _ in range(2):
        request = clip_pb2.Request(encode=clip_pb2.EncodeRequest(items=[item]))
        start = time.perf_counter()
        response: clip_pb2.Response = yield server.send(request, timeout)
        roundtrip = 1000 * (time.perf_counter() - start)
    for error in response.encode.errors:
        raise InvalidInputError(f"{content!r} cannot be encoded: {error.message}")
    timings = response.encode.timings
    show(roundtrip, timings)
    return latencies(roundtrip, timings)


def info(server: Connection, timeout: float | None, model: str = "") -> CallGenerator[Info]:
    """`Client.info`."""
    response: clip_pb2.Response = yield server.send(_info_request(model), timeout)
    return Info.of(response.info)


def _encoding(
    server: Connection,
    collector: Collector,
    sending: Sending,
    template: clip_pb2.Request,
    first: Future[Any] | None = None,
) -> Encoding:
    def send(request: clip_pb2.Request) -> Future[clip_pb2.Response]:
        return server.send(request, sending.timeout)

    return Encoding(
        send,
        server.read,
        collector,
        batch_size=sending.batch_size,
        prefetch=sending.prefetch,
        template=template,
        first=first,
    )


def _encode_template(parameters: Parameters) -> clip_pb2.Request:
    """A request to encode, without items."""
    encode = clip_pb2.EncodeRequest(options=parameters.options, model=parameters.model)
    return clip_pb2.Request(encode=encode)


def _on_rows(
    server: Connection,
    collector: RowCollector,
    items: Any,
    template: clip_pb2.Request,
    sending: Sending,
    on_item_error: str | None,
    name: str,
) -> CallGenerator[Any]:
    """Sends items to the indexer: the Documents, if all of them are, else a result of each."""
    policy = _item_policy(on_item_error, collector.callbacks)
    yield from _encoding(server, collector, sending, template).run(iterate(items, name))
    result: Any = None
    if collector.keeps:
        documents = collector.documents
        result = collector.results
        if documents is not None or is_document_list(items):
            result = returned(items, documents or [])
    _warn(collector.truncated)
    return _finish(result, collector.failures, collector.total, policy)


def _embedded(
    server: Connection, raw_items: Inputs, given: Parameters, timeout: float | None
) -> CallGenerator[tuple[NDArray[np.float32], ResultCollector, clip_pb2.InfoResponse]]:
    """The embeddings [N, D] of items, what else was collected, and the model."""
    collector = ResultCollector(into_documents=False)
    asked = server.send(_info_request(given.model), timeout)
    sending = Sending(timeout=timeout)
    template = _encode_template(given)
    yield from _encoding(server, collector, sending, template).run(raw_items)
    model = (yield asked).info
    return collector.embeddings(model.dim), collector, model


def _descended(raw_items: Inputs, paths: list[str], roots: list[Any] | None) -> Inputs:
    """The Documents at the end of the access paths; `roots`, if any, gets those they start from."""
    if isinstance(raw_items, Iterator):
        return _descended_now(raw_items, paths, roots)

    async def descended() -> AsyncIterator[Any]:
        async for root in raw_items:
            if roots is not None:
                roots.append(root)
            for each in descend(root, paths):
                yield each

    return descended()


def _descended_now(
    raw_items: Iterator[Any], paths: list[str], roots: list[Any] | None
) -> Iterator[Any]:
    for root in raw_items:
        if roots is not None:
            roots.append(root)
        yield from descend(root, paths)


def _as_images(raw_items: Inputs) -> Inputs:
    if isinstance(raw_items, Iterator):
        return map(inputs.as_image, raw_items)
    return (inputs.as_image(raw_item) async for raw_item in raw_items)


def _synchronous(raw_items: Any) -> Iterator[Any]:
    items = iterate(raw_items, "rank")
    if isinstance(items, Iterator):
        return items
    raise TypeError("rank compares items with each other: pass a list, not an async generator")


def _best_first(scores: NDArray[np.float64]) -> list[tuple[int, float]]:
    return [(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")]


def _item_policy(on_item_error: str | None, callbacks: Callbacks | None = None) -> str:
    """The policy for errors of items: 'raise', 'return', or 'pass' if `on_error` gets them."""
    if on_item_error is None:
        return "pass" if callbacks and callbacks.on_error else "raise"
    if on_item_error not in ("raise", "return"):
        raise InvalidInputError(f"on_item_error is 'raise' or 'return', not {on_item_error!r}")
    return on_item_error


def _warn(truncated: int) -> None:
    if truncated:
        # Above it are the call, what runs it and the Client's method.
        warnings.warn(TruncationWarning(truncated), stacklevel=5)


def _finish(
    result: T,
    failures: Sequence[ItemFailure],
    total: int,
    policy: str,
    embeddings: NDArray[np.float32] | None = None,
) -> T | tuple[T, list[ItemFailure]]:
    if policy == "return":
        return result, list(failures)
    if failures and policy == "raise":
        raise ItemsError(failures, total, embeddings)
    return result


def _info_request(model: str = "") -> clip_pb2.Request:
    return clip_pb2.Request(info=clip_pb2.InfoRequest(model=model))
