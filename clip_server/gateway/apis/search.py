"""Requests on the flow's collection in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from clip_client.proto import clip_pb2 as pb
from clip_server.gateway import search_json
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
        message: Message = (
            search_json.delete_request(body)
            if call.endpoint == "/delete"
            else search_json.count_request(body)
        )
        counted = await self._ask(call.endpoint[1:], message, request)
        return json_response({"count": counted.count})

    async def _ask(self, kind: str, message: Message, request: Request) -> Any:
        return await ask(self._listener.call, kind, message, request)

    async def _index(self, call: JsonCall, request: Request) -> dict[str, Any]:
        SearchParameters.parse(call.given, refuse_unknown=True)
        entries = call.required_entries()
        check_count(len(entries), self._listener.router.max_request_items)
        items, unfit = to_items(entries)
        for index, (item, entry) in enumerate(zip(items, entries, strict=True)):
            if index not in unfit and (why := search_json.add_details(item, entry)):
                unfit[index] = why
                item.Clear()
        message = pb.IndexRequest(items=items, embeddings=search_json.embeddings_of(entries))
        answer = await self._ask("index", message, request)
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
        message.embeddings = search_json.embeddings_of(entries)
        answer = await self._ask("search", message, request)
        errors = {error.index: error.message for error in answer.errors} | unfit
        data = []
        for index, (entry, found) in enumerate(zip(entries, answer.results, strict=True)):
            result = echo(entry, None)
            if index in errors:
                result["error"] = errors[index]
            else:
                result["matches"] = [search_json.match(hit, answer.metric) for hit in found.hits]
            data.append(result)
        return {"data": data, "truncated": answer.truncated}
