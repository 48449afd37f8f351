"""The JSON of a collection's requests and responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clip_client.proto import clip_pb2 as pb
from clip_client.tags import tags_to_dict
from clip_server.errors import RequestError
from clip_server.rpc.search_parameters import SearchParameters


def add_details(item: pb.Item, entry: Any) -> str | None:
    """Adds the id, tags and source of an entry of `data` to its item; why they cannot be."""
    if not isinstance(entry, Mapping):
        return None
    if entry.get("id") is not None:
        item.id = str(entry["id"])
    source = entry.get("source")
    if source is not None and not isinstance(source, str):
        return "the source is not a string, such as a path"
    try:
        item.source = source or ""
        item.tags.update(entry.get("tags") or {})
    except (ValueError, TypeError, UnicodeEncodeError):
        return "the tags are not of texts, numbers, true and false, and lists and objects of them"
    return None


def embeddings_of(entries: Sequence[Any]) -> bytes:
    """The embeddings that entries bring along, where each does; empty: none does.

    Raises:
        RequestError: some do and some do not, or they are no numbers.
    """
    given = [each.get("embedding") for each in entries if isinstance(each, Mapping)]
    given = [each for each in given if each is not None]
    if not given:
        return b""
    try:
        matrix = np.array(given, "<f4")
    except (ValueError, TypeError, OverflowError):
        matrix = np.empty(0, "<f4")
    if len(given) != len(entries) or matrix.ndim != 2:
        raise RequestError(
            'either each entry of data has an "embedding", a list of numbers of one length, or none'
        )
    return matrix.tobytes()


def delete_request(body: Mapping[str, Any]) -> pb.DeleteRequest:
    """`{"ids": [...]}`, `{"data": [{"id": ...}]}` or `{"parameters": {"filter": {...}}}`.

    Raises:
        RequestError: it is none of them.
    """
    options = SearchParameters.parse(body.get("parameters"), refuse_unknown=True)
    ids = body.get("ids")
    if ids is None:
        entries = body.get("data") or []
        ids = [
            each.get("id") if isinstance(each, Mapping) else each
            for each in (entries if isinstance(entries, list) else [None])
        ]
    if not isinstance(ids, list) or not all(isinstance(each, str | int) for each in ids):
        raise RequestError('to delete, send {"ids": ["..."]} or {"parameters": {"filter": {...}}}')
    return pb.DeleteRequest(ids=[str(each) for each in ids], filter=options.filter)


def count_request(body: Mapping[str, Any]) -> pb.CountRequest:
    """`{"parameters": {"filter": {...}, "target": "images"}}`, both optional.

    Raises:
        RequestError: a parameter is not allowed.
    """
    options = SearchParameters.parse(body.get("parameters"), refuse_unknown=True)
    return pb.CountRequest(filter=options.filter, target=options.target)


def match(hit: pb.Hit, metric: str) -> dict[str, Any]:
    """A hit as an entry of `matches`."""
    found: dict[str, Any] = {"id": hit.id, "modality": "image" if hit.is_image else "text"}
    if hit.text:
        found["text"] = hit.text
    if hit.source:
        found["uri"] = hit.source
    if hit.HasField("tags"):
        found["tags"] = tags_to_dict(hit.tags)
    found["scores"] = {metric.lower(): {"value": hit.score}}
    if hit.HasField("relevance"):
        found["scores"]["relevance"] = {"value": hit.relevance}
    return found
