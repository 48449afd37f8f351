"""The calls of the Client, each written once as a flow (see flow.py)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import content
from clip_client.connection import Connection
from clip_client.encoding import Encoding, Things, iterate
from clip_client.errors import InvalidInputError, ItemFailure, ItemsError
from clip_client.flow import Flow
from clip_client.gathering import Callback, Gathered, progress
from clip_client.profiling import latencies, show
from clip_client.proto import clip_pb2
from clip_client.ranking import order_matches
from clip_client.results import Label, Latency, Ranking, cosines, probabilities

TIMEOUT = 300.0
PREFETCH = 8
# What users of clip-as-service may still pass: another name of a parameter, and one that asks
# for what is always so, that a picture's content does not come back.
_OTHER_NAMES = {"batch_size": "minibatch_size"}
_NEEDLESS = {"drop_image_content"}


def encode(
    server: Connection,
    items: Any,
    *,
    batch_size: int | None = None,
    prefetch: int = PREFETCH,
    show_progress: bool = False,
    parameters: Mapping[str, Any] | None = None,
    on_item_error: str = "raise",
    on_done: Callback | None = None,
    on_error: Callback | None = None,
    on_always: Callback | None = None,
    timeout: float | None = TIMEOUT,
) -> Flow[Any]:
    """The embeddings of texts and pictures: [N, D] float32, in order.

    items: an iterable of texts, paths, URLs, bytes, PIL images, uint8 arrays, dicts and
        Documents; clip_client.content says which str is which. A generator is read only as far
        ahead as is needed, and the async call takes async ones too. Where all items are
        Documents, `.embedding` is set in each and they are the result.
    batch_size: items of one request; by default 128 texts or 32 pictures. A request is kept
        below 3 MB in any case.
    prefetch: requests under way at once.
    show_progress: draws a bar on stderr.
    parameters: `normalize` (bool: vectors of length 1) and `minibatch_size` (int: items the
        model takes at once).
    on_item_error: 'raise' raises ItemsError for the items that failed, at the end, with the
        others' embeddings in it; 'return' returns `(result, failures)`, with NaN in their rows.
    on_done, on_error, on_always: called in order with a Batch: when it was answered, when it or
        an item of it failed, and in any case. Errors are raised all the same. With `on_done`,
        which takes the embeddings, none are kept and the result is None.
    timeout: seconds that one request may take; None: for ever.

    Raises ItemsError, ServerError, ConnectionFailedError or InvalidInputError; and TypeError for
    one item where several are meant.
    """
    _check_item_error(on_item_error)
    things = iterate(items)
    with progress(show_progress, items) as advance:
        gathered = Gathered(on_done, on_error, on_always, advance)
        encoding = _encoding(server, gathered, batch_size, prefetch, parameters, timeout)
        yield from encoding.run(things)
    embeddings = None
    if gathered.keeps:
        embeddings = gathered.embeddings(gathered.dim or (yield from info(server, timeout)).dim)
    result: Any = embeddings
    if gathered.keeps and gathered.documents is not None:
        result = gathered.documents if things is items else items
    return _finish(result, gathered.failures, gathered.total, on_item_error, embeddings)


def rank(
    server: Connection,
    query: Any,
    candidates: Iterable[Any] | None = None,
    *,
    on_item_error: str = "raise",
    timeout: float | None = TIMEOUT,
) -> Flow[Any]:
    """The candidates by how well each goes with the query: a list of Ranking, best first.

    query, candidates: items as `encode` takes them, any number of candidates. Without
        `candidates`, `query` is a list of Documents with candidates in their `.matches`: these
        are sorted in place, with `clip_score` (the probability) and `clip_score_cosine` in the
        `.scores` of each match, or in its `.tags` where it has no scores, and returned.
    on_item_error: 'raise' raises ItemsError for candidates that failed; 'return' returns
        `(rankings, failures)`. A query that failed raises InvalidInputError in any case.
    timeout: seconds that one request may take; None: for ever.
    """
    _check_item_error(on_item_error)
    documents = _listed(query) if candidates is None else []
    groups = [(document, list(document.matches)) for document in documents]
    if candidates is not None:
        groups = [(query, _listed(candidates))]
    rankings, failures = yield from _ranked(server, groups, timeout)
    for document, ranking in zip(documents, rankings, strict=False):
        order_matches(document, ranking)
    result: Any = documents if isinstance(query, Iterator) else query
    if candidates is not None:
        result = rankings[0]
    total = sum(len(matches) for _, matches in groups)
    return _finish(result, failures, total, on_item_error)


def classify(
    server: Connection,
    images: Any,
    labels: Sequence[str],
    *,
    prompt: str = "a photo of a {}",
    on_item_error: str = "raise",
    timeout: float | None = TIMEOUT,
) -> Flow[Any]:
    """What each image shows: for each a list of Label, one for each of `labels`, best first.

    images: pictures as `encode` takes them; a str is a path, a URL or a `data:` URI.
    labels: what they may show, at least one; each is put in place of the {} in `prompt`.
    on_item_error: 'raise' raises ItemsError for images that failed; 'return' returns
        `(results, failures)`, with None in the place of those.
    timeout: seconds that one request may take; None: for ever.
    """
    _check_item_error(on_item_error)
    if isinstance(labels, str) or not labels:
        raise InvalidInputError("labels is a list of at least one str")
    if "{}" not in prompt:
        raise InvalidInputError(f"the prompt {prompt!r} has no {{}} for the label to go")
    pictures = _as_pictures(iterate(images, "classify"))
    prompts = [{"text": prompt.replace("{}", label)} for label in labels]
    targets, failed, scale = yield from _embedded(server, iter(prompts), timeout)
    for place, failure in failed.items():
        raise InvalidInputError(f"label {labels[place]!r}: {failure.message}")
    queries, failed, _ = yield from _embedded(server, pictures, timeout)
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
    return _finish(results, list(failed.values()), len(results), on_item_error)


def profile(
    server: Connection, text: str = "a text", *, timeout: float | None = TIMEOUT
) -> Flow[dict[str, Latency]]:
    """Sends a text, prints where its time went as a tree, and returns the tree's lines.

    Each is `(milliseconds, percent)`, the percentage that of the line it is part of. The first
    request of a Client also opens the connection, so one goes ahead that is not counted.
    """
    items = [clip_pb2.Item(text=text)]
    for _ in range(2):
        request = clip_pb2.Request(encode=clip_pb2.EncodeRequest(items=items))
        start = time.perf_counter()
        response: clip_pb2.Response = yield server.send(request, timeout)
        roundtrip = 1000 * (time.perf_counter() - start)
    lines = latencies(roundtrip, response.encode.timings)
    show(lines)
    return lines


def info(server: Connection, timeout: float | None = TIMEOUT) -> Flow[clip_pb2.InfoResponse]:
    """What the server runs: its model, runtime, device, `dim`, `logit_scale` and version."""
    response: clip_pb2.Response = yield server.send(_info_request(), timeout)
    return response.info


def _encoding(
    server: Connection,
    gathered: Gathered,
    batch_size: int | None = None,
    prefetch: int = PREFETCH,
    parameters: Mapping[str, Any] | None = None,
    timeout: float | None = TIMEOUT,
) -> Encoding:
    for name, value in (("batch_size", batch_size), ("prefetch", prefetch)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InvalidInputError(f"{name} is a whole number from 1, not {value!r}")

    def send(request: clip_pb2.Request) -> Future[clip_pb2.Response]:
        return server.send(request, timeout)

    options = _options(parameters or {})
    return Encoding(
        send, server.read, gathered, batch_size=batch_size, prefetch=prefetch, options=options
    )


def _options(parameters: Mapping[str, Any]) -> clip_pb2.Options:
    known = clip_pb2.Options.DESCRIPTOR.fields_by_name
    given = {
        _OTHER_NAMES.get(name, name): value
        for name, value in parameters.items()
        if name not in _NEEDLESS
    }
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidInputError(f"no parameter is named {unknown[0]!r}; there are {list(known)}")
    try:
        return clip_pb2.Options(**given)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"parameters: {error}") from None


def _embedded(
    server: Connection, things: Things, timeout: float | None
) -> Flow[tuple[NDArray[np.float32], dict[int, ItemFailure], float]]:
    """The embeddings [N, D] of items, the failures by place, and the model's logit scale."""
    gathered = Gathered(into_documents=False)
    asked = server.send(_info_request(), timeout)
    yield from _encoding(server, gathered, timeout=timeout).run(things)
    told = (yield asked).info
    failures = {failure.index: failure for failure in gathered.failures}
    return gathered.embeddings(told.dim), failures, told.logit_scale


def _ranked(
    server: Connection, groups: Sequence[tuple[Any, Sequence[Any]]], timeout: float | None
) -> Flow[tuple[list[list[Ranking]], list[ItemFailure]]]:
    """The rankings of each query and its candidates, and the candidates that failed.

    The place of a failure counts the candidates of all groups.
    """
    things = [thing for query, candidates in groups for thing in (query, *candidates)]
    rows, failed, scale = yield from _embedded(server, iter(things), timeout)
    rankings, failures, start = [], [], 0
    for number, (_, candidates) in enumerate(groups):
        if start in failed:
            raise InvalidInputError(f"the query cannot be encoded: {failed[start].message}")
        places = range(start + 1, start + 1 + len(candidates))
        good = [place for place in places if place not in failed]
        cosine = cosines(rows[[start]], rows[good])
        scores = probabilities(cosine, scale)
        rankings.append(
            [
                Ranking(
                    good[best] - places.start, things[good[best]], score, float(cosine[0, best])
                )
                for best, score in _best_first(scores[0])
            ]
        )
        failures += [
            ItemFailure(place - number - 1, failed[place].message)
            for place in places
            if place in failed
        ]
        start = places.stop
    return rankings, failures


def _as_pictures(things: Things) -> Things:
    if isinstance(things, Iterator):
        return map(content.as_picture, things)
    return (content.as_picture(thing) async for thing in things)


def _listed(things: Any) -> list[Any]:
    items = iterate(things, "rank")
    if isinstance(items, Iterator):
        return list(items)
    raise TypeError("rank compares items with each other: pass a list, not an async generator")


def _best_first(scores: NDArray[np.float64]) -> list[tuple[int, float]]:
    return [(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")]


def _check_item_error(on_item_error: str) -> None:
    if on_item_error not in ("raise", "return"):
        raise InvalidInputError(f"on_item_error is 'raise' or 'return', not {on_item_error!r}")


def _finish(
    result: Any,
    failures: Sequence[ItemFailure],
    total: int,
    on_item_error: str,
    embeddings: NDArray[np.float32] | None = None,
) -> Any:
    if on_item_error == "return":
        return result, list(failures)
    if failures:
        raise ItemsError(failures, total, embeddings)
    return result


def _info_request() -> clip_pb2.Request:
    return clip_pb2.Request(info=clip_pb2.InfoRequest())
