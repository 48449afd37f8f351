"""Requests on the flow's collection in JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from clip_client.proto import clip_pb2 as pb
from clip_client.tags import tags_to_dict
from clip_server.errors import RequestError
from clip_server.gateway.apis.entries import echo, to_items
from clip_server.gateway.apis.json_call import JsonCall
from clip_server.gateway.collection import KINDS
from clip_server.gateway.http_messages import ask, json_response
from clip_server.gateway.listener import Listener
from clip_server.rpc.errors import check_count
from clip_server.rpc.search_parameters import SearchParameters

SEARCH_ENDPOINTS = tuple(f"/{kind}" for kind in KINDS)


class SearchApi:
    """Answers `/index`, `/search`, `/delete` and `/count`.

    listener: of the port.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def answers(self, call: JsonCall) -> bool:
        """Whether a call is on the collection; Jina's clients reach it through the flow."""
        has_collection = self._listener.router.collection is not None
        return has_collection and not call.is_jinas and call.endpoint in SEARCH_ENDPOINTS

    async def answer(self, call: JsonCall, body: Mapping[str, Any], request: Request) -> Response:
        """The response to a call that came in `body`."""
        if call.endpoint == "/index":
            return json_response(await self._index(call, request))
        if call.endpoint == "/search":
            return json_response(await self._search(call, request))
        read = _delete_request if call.endpoint == "/delete" else _count_request
        counted = await self._ask(read(body), request)
        return json_response({"count": counted.count})

    async def _ask(self, message: pb.Request, request: Request) -> Any:
        return await ask(self._listener.call, message, request)

    async def _index(self, call: JsonCall, request: Request) -> dict[str, Any]:
        SearchParameters.parse(call.given, refuse_unknown=True)
        entries = call.required_entries()
        check_count(len(entries), self._listener.router.max_request_items)
        items, unfit = to_items(entries)
        for index, (item, entry) in enumerate(zip(items, entries, strict=True)):
            if index not in unfit and (why := _add_details(item, entry)):
                unfit[index] = why
                item.Clear()
        message = pb.IndexRequest(items=items, embeddings=_embeddings_of(entries))
        answer = await self._ask(pb.Request(index=message), request)
        errors = {error.index: error.message for error in answer.errors} | unfit
        data = [
            {"id": row_id} if index not in errors else {"error": errors[index]}
            for index, row_id in enumerate(answer.ids)
        ]
        return {"data": data, "truncated": answer.truncated}

    async def _search(self, call: JsonCall, request: Request) -> dict[str, Any]:
        entries = call.required_entries()
        check_count(len(entries), self._listener.router.max_request_items)
        message = SearchParameters.parse(call.given, refuse_unknown=True).to_request()
        items, unfit = to_items(entries)
        message.queries.extend(items)
        message.embeddings = _embeddings_of(entries)
        answer = await self._ask(pb.Request(search=message), request)
        errors = {error.index: error.message for error in answer.errors} | unfit
        data = []
        for index, (entry, found) in enumerate(zip(entries, answer.results, strict=True)):
            result = echo(entry, None)
            if index in errors:
                result["error"] = errors[index]
            else:
                result["matches"] = [_match(hit, answer.metric) for hit in found.hits]
            data.append(result)
        return {"data": data, "truncated": answer.truncated}


def _add_details(item: pb.Item, entry: Any) -> str | None:
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


def _embeddings_of(entries: Sequence[Any]) -> bytes:
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


def _delete_request(body: Mapping[str, Any]) -> pb.Request:
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
    request = pb.DeleteRequest(ids=[str(each) for each in ids], filter=options.filter)
    return pb.Request(delete=request)


def _count_request(body: Mapping[str, Any]) -> pb.Request:
    """`{"parameters": {"filter": {...}, "target": "images"}}`, both optional.

    Raises:
        RequestError: a parameter is not allowed.
    """
    options = SearchParameters.parse(body.get("parameters"), refuse_unknown=True)
    return pb.Request(count=pb.CountRequest(filter=options.filter, target=options.target))


def _match(hit: pb.Hit, metric: str) -> dict[str, Any]:
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
