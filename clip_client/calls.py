"""The calls of the Client, each written once as a generator (see sansio.py)."""

from __future__ import annotations

import operator
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, SupportsIndex, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from clip_client import inputs
from clip_client.collector import Callback, ResultCollector, progress
from clip_client.connection import Connection
from clip_client.errors import InvalidInputError, ItemFailure, ItemsError, TruncationWarning
from clip_client.pipeline import Encoding, Inputs, iterate
from clip_client.profiling import latencies, show
from clip_client.proto import clip_pb2
from clip_client.ranking import order_matches
from clip_client.results import Info, Label, Latency, Ranking
from clip_client.sansio import CallGenerator
from clip_client.scores import cosines, probabilities

T = TypeVar("T")

TIMEOUT = 300.0
PREFETCH = 8
# Parameters of clip-as-service that are still accepted: aliases, and those that change nothing.
_PARAMETER_ALIASES = {"batch_size": "minibatch_size"}
_IGNORED_PARAMETERS = {"drop_image_content"}


class EncodeOptions(TypedDict, total=False):
    """The options of `encode` that do not change what it returns."""

    batch_size: SupportsIndex | None
    prefetch: SupportsIndex
    show_progress: bool
    normalize: bool | None
    parameters: Mapping[str, Any] | None
    on_error: Callback | None
    on_always: Callback | None
    timeout: float | None


def encode(
    server: Connection,
    items: Any,
    *,
    on_item_error: str,
    on_done: Callback | None,
    batch_size: SupportsIndex | None = None,
    prefetch: SupportsIndex = PREFETCH,
    show_progress: bool = False,
    normalize: bool | None = None,
    parameters: Mapping[str, Any] | None = None,
    on_error: Callback | None = None,
    on_always: Callback | None = None,
    timeout: float | None = TIMEOUT,
) -> CallGenerator[Any]:
    """`Client.encode`."""
    _check_item_error(on_item_error)
    raw_items = iterate(items)
    with progress(show_progress, items) as advance:
        collector = ResultCollector(on_done, on_error, on_always, advance)
        options = _options(parameters or {}, normalize)
        encoding = _encoding(server, collector, batch_size, prefetch, options, timeout)
        try:
            yield from encoding.run(raw_items)
            dim = collector.dim
            if collector.keeps and not dim:
                dim = (yield from info(server, timeout)).dim
        except Exception as error:
            if collector.keeps:
                # Of an exception of the user's own too, such as a generator's.
                error.__dict__["embeddings"] = collector.computed(items)
            raise
    embeddings = collector.embeddings(dim) if collector.keeps else None
    result: Any = embeddings
    if collector.keeps and collector.documents is not None:
        result = collector.documents if raw_items is items else items
    _warn(collector.truncated)
    return _finish(result, collector.failures, collector.total, on_item_error, embeddings)


def rank(
    server: Connection,
    query: Any,
    candidates: Iterable[Any] | None,
    *,
    on_item_error: str,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.rank`."""
    _check_item_error(on_item_error)
    documents = _listed(query) if candidates is None else []
    groups = [(document, list(document.matches)) for document in documents]
    if candidates is not None:
        groups = [(query, _listed(candidates))]
    rankings, failures, truncated = yield from _ranked(server, groups, timeout)
    for document, ranking in zip(documents, rankings, strict=False):
        order_matches(document, ranking)
    result: Any = documents if isinstance(query, Iterator) else query
    if candidates is not None:
        result = rankings[0]
    _warn(truncated)
    total = sum(len(matches) for _, matches in groups)
    return _finish(result, failures, total, on_item_error)


def classify(
    server: Connection,
    images: Any,
    labels: Sequence[str],
    *,
    prompt: str,
    on_item_error: str,
    timeout: float | None,
) -> CallGenerator[Any]:
    """`Client.classify`."""
    _check_item_error(on_item_error)
    if isinstance(labels, str) or not labels:
        raise InvalidInputError("labels is a list of at least one str")
    if "{}" not in prompt:
        raise InvalidInputError(f"the prompt {prompt!r} has no {{}} for the label to go")
    images = _as_images(iterate(images, "classify"))
    prompts = [{"text": prompt.replace("{}", label)} for label in labels]
    targets, collector, scale = yield from _embedded(server, iter(prompts), timeout)
    for failure in collector.failures:
        raise InvalidInputError(f"label {labels[failure.index]!r}: {failure.message}")
    truncated = collector.truncated
    queries, collector, _ = yield from _embedded(server, images, timeout)
    failed = {failure.index for failure in collector.failures}
    cosine = cosines(queries, targets)
    scores = probabilities(cosine, scale)
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
    return _finish(results, collector.failures, len(results), on_item_error)


def profile(
    server: Connection, text: str, timeout: float | None
) -> CallGenerator[dict[str, Latency]]:
    """`Client.profile`."""
    items = [clip_pb2.Item(text=text)]
    for _ in range(2):
        request = clip_pb2.Request(encode=clip_pb2.EncodeRequest(items=items))
        start = time.perf_counter()
        response: clip_pb2.Response = yield server.send(request, timeout)
        roundtrip = 1000 * (time.perf_counter() - start)
    lines = latencies(roundtrip, response.encode.timings)
    show(lines)
    return lines


def info(server: Connection, timeout: float | None) -> CallGenerator[Info]:
    """`Client.info`."""
    response: clip_pb2.Response = yield server.send(_info_request(), timeout)
    return Info.of(response.info)


def _encoding(
    server: Connection,
    collector: ResultCollector,
    batch_size: SupportsIndex | None = None,
    prefetch: SupportsIndex = PREFETCH,
    options: clip_pb2.Options | None = None,
    timeout: float | None = TIMEOUT,
) -> Encoding:
    def send(request: clip_pb2.Request) -> Future[clip_pb2.Response]:
        return server.send(request, timeout)

    return Encoding(
        send,
        server.read,
        collector,
        batch_size=None if batch_size is None else _positive("batch_size", batch_size),
        prefetch=_positive("prefetch", prefetch),
        options=options or clip_pb2.Options(),
    )


def _positive(name: str, value: SupportsIndex) -> int:
    try:
        number = 0 if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise InvalidInputError(f"{name} is a whole number from 1, not {value!r}")
    return number


def _options(parameters: Mapping[str, Any], normalize: bool | None) -> clip_pb2.Options:
    known = clip_pb2.Options.DESCRIPTOR.fields_by_name
    given = {
        _PARAMETER_ALIASES.get(name, name): value
        for name, value in parameters.items()
        if name not in _IGNORED_PARAMETERS
    }
    if normalize is not None:
        given["normalize"] = normalize
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidInputError(f"no parameter is named {unknown[0]!r}; there are {list(known)}")
    if not isinstance(given.get("normalize", False), (bool, np.bool_)):
        raise InvalidInputError(
            f"the parameter normalize is True or False, not {given['normalize']!r}"
        )
    if "minibatch_size" in given:
        size = given["minibatch_size"]
        given["minibatch_size"] = size and _positive("the parameter minibatch_size", size)
    try:
        return clip_pb2.Options(**given)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"parameters: {error}") from None


def _embedded(
    server: Connection, raw_items: Inputs, timeout: float | None
) -> CallGenerator[tuple[NDArray[np.float32], ResultCollector, float]]:
    """The embeddings [N, D] of items, what else was collected, and the model's logit scale."""
    collector = ResultCollector(into_documents=False)
    asked = server.send(_info_request(), timeout)
    yield from _encoding(server, collector, timeout=timeout).run(raw_items)
    model = (yield asked).info
    return collector.embeddings(model.dim), collector, model.logit_scale


def _ranked(
    server: Connection, groups: Sequence[tuple[Any, Sequence[Any]]], timeout: float | None
) -> CallGenerator[tuple[list[list[Ranking]], list[ItemFailure], int]]:
    """The rankings of each query and its candidates, the candidates that failed, and texts cut.

    The place of a failure counts the candidates of all groups.
    """
    raw_items = [raw_item for query, candidates in groups for raw_item in (query, *candidates)]
    rows, collector, scale = yield from _embedded(server, iter(raw_items), timeout)
    failed = {failure.index: failure for failure in collector.failures}
    rankings, failures, start = [], [], 0
    for number, (_, candidates) in enumerate(groups):
        if start in failed:
            query = failed[start]
            raise InvalidInputError(
                f"the query cannot be encoded: {query.message} (the query is {query.item})"
            )
        places = range(start + 1, start + 1 + len(candidates))
        good = [place for place in places if place not in failed]
        cosine = cosines(rows[[start]], rows[good])
        scores = probabilities(cosine, scale)
        rankings.append(
            [
                Ranking(
                    good[best] - places.start, raw_items[good[best]], score, float(cosine[0, best])
                )
                for best, score in _best_first(scores[0])
            ]
        )
        failures += [
            replace(failed[place], index=place - number - 1) for place in places if place in failed
        ]
        start = places.stop
    return rankings, failures, collector.truncated


def _as_images(raw_items: Inputs) -> Inputs:
    if isinstance(raw_items, Iterator):
        return map(inputs.as_image, raw_items)
    return (inputs.as_image(raw_item) async for raw_item in raw_items)


def _listed(raw_items: Any) -> list[Any]:
    items = iterate(raw_items, "rank")
    if isinstance(items, Iterator):
        return list(items)
    raise TypeError("rank compares items with each other: pass a list, not an async generator")


def _best_first(scores: NDArray[np.float64]) -> list[tuple[int, float]]:
    return [(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")]


def _check_item_error(on_item_error: str) -> None:
    if on_item_error not in ("raise", "return"):
        raise InvalidInputError(f"on_item_error is 'raise' or 'return', not {on_item_error!r}")


def _warn(truncated: int) -> None:
    if truncated:
        # Above it are the call, what runs it and the Client's method.
        warnings.warn(TruncationWarning(truncated), stacklevel=5)


def _finish(
    result: T,
    failures: Sequence[ItemFailure],
    total: int,
    on_item_error: str,
    embeddings: NDArray[np.float32] | None = None,
) -> T | tuple[T, list[ItemFailure]]:
    if on_item_error == "return":
        return result, list(failures)
    if failures:
        raise ItemsError(failures, total, embeddings)
    return result


def _info_request() -> clip_pb2.Request:
    return clip_pb2.Request(info=clip_pb2.InfoRequest())
