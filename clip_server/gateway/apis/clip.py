"""Our own dialect, which is that of clip-as-service and Jina: documents in, documents out."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
from starlette import routing
from starlette.requests import Request
from starlette.responses import Response

from clip_client.documents import parse_access_paths
from clip_client.envelope import serialize_messages
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.apis.entries import (
    descend,
    echo,
    encode_request,
    find_fault,
    to_item,
    to_items,
)
from clip_server.gateway.apis.flow import ask_flow
from clip_server.gateway.apis.json_call import JsonCall
from clip_server.gateway.apis.search import SEARCH_ENDPOINTS, SearchApi
from clip_server.gateway.apis.tei import TeiApi
from clip_server.gateway.collection import KINDS
from clip_server.gateway.http_messages import (
    PROTOBUF,
    ask,
    is_protobuf,
    json_response,
    parse_message,
    parse_object,
    protobuf_response,
    read_body,
    unless_client_leaves,
)
from clip_server.gateway.listener import Listener
from clip_server.gateway.observation import current
from clip_server.gateway.topology import FlowExecutor, Route
from clip_server.rpc.errors import check_count
from clip_server.rpc.grpc_service import parse

# The endpoints whose requests and answers are messages of clip.v1 as well.
_MESSAGES = tuple(f"/{kind}" for kind in ("encode", "rank", *KINDS))
_ENCODE, _RANK = ("/", "/encode"), "/rank"


class ClipApi:
    """Answers documents in JSON, and clip.v1 in protobuf.

    listener: of the port.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._search = SearchApi(listener)
        self._tei = TeiApi(listener)

    def routes(self) -> list[routing.Route]:
        """The endpoints that every flow has."""
        named = [routing.Route(each, self.answer, methods=["POST"]) for each in ("/", *_MESSAGES)]
        return [*named, routing.Route("/post", self._answer_post, methods=["POST"])]

    async def answer(self, request: Request) -> Response:
        """The response to a request for the endpoint of its path."""
        body = await read_body(request, self._listener.options.max_request_bytes)
        endpoint = request.scope["path"]
        if is_protobuf(request):
            if endpoint == "/":
                return await self._answer_several(body, request)
            return await self._answer_protobuf(endpoint, body, request)
        content = parse_object(body)
        if endpoint == "/" and TeiApi.claims(content):
            return await self._tei.answer(content, request)
        return await self._answer_json(content, endpoint, request)

    async def _answer_post(self, request: Request) -> Response:
        body = await read_body(request, self._listener.options.max_request_bytes)
        return await self._answer_json(parse_object(body), None, request)

    async def _answer_protobuf(self, endpoint: str, body: bytes, request: Request) -> Response:
        if endpoint not in _MESSAGES:
            raise RequestError(f"only /, {', '.join(_MESSAGES)} take protobuf: send JSON")
        return protobuf_response(await self._ask(parse_message(endpoint[1:], body), request))

    async def _answer_several(self, body: bytes, request: Request) -> Response:
        """The response to requests that share a body, as they would share a message of a stream."""
        requests = parse(pb.Requests, body).requests
        check_count(len(requests), self._listener.router.max_request_items)
        if observed := current():
            observed.is_envelope = True
        call = self._listener.observer.observing(self._listener.call)
        # One can only cancel requests that came before it, which are not those of this body.
        answers = asyncio.gather(*(call(each) for each in requests if not each.HasField("cancel")))
        responses = iter(await unless_client_leaves(answers, request))
        # Envelopes one after the other are one.
        content = b"".join(iter(lambda: serialize_messages(responses), b""))
        return Response(content, media_type=PROTOBUF)

    async def _ask(self, message: pb.Request, request: Request) -> Any:
        return await ask(self._listener.call, message, request)

    async def _answer_json(
        self, body: Mapping[str, Any], endpoint: str | None, request: Request
    ) -> Response:
        """The response to a body. endpoint: None: the body names it."""
        call = JsonCall.parse(body, endpoint)
        if observed := current():
            observed.endpoint = call.endpoint
            observed.rename(call.request_id)
        route = self._listener.router.route(call.endpoint, call.parameters.model_name, call.target)
        # A flow without a collection says so where the path asks for one.
        if self._search.answers(call) or (endpoint in SEARCH_ENDPOINTS and route.is_direct):
            return await self._search.answer(call, body, request)
        encoder = _encoder_alone(call, route)
        if encoder is None:
            check_count(len(call.entries or ()), self._listener.router.max_request_items)
            answer = await unless_client_leaves(ask_flow(self._listener.jina, call), request)
            return json_response(answer)
        begun, truncated = _now(), 0
        if route.endpoint == _RANK:
            data = await self._rank(call, encoder, request)
        else:
            data, truncated = await self._encode(call, encoder, request)
        ended = _now()
        routes = [(name, begun, ended) for name in ("gateway", encoder.name)]
        answer = call.answer(data, routes, call.given)
        if not call.is_jinas:
            answer["truncated"] = truncated
        return json_response(answer)

    async def _encode(
        self, call: JsonCall, encoder: FlowExecutor, request: Request
    ) -> tuple[list[Any], int]:
        call.refuse_unknown_parameters()
        entries, parameters = call.required_entries(), call.parameters
        most = self._listener.router.max_request_items
        # Before any of them is looked at, which takes time that others wait.
        check_count(len(entries), most)
        echoes = [echo(entry, call.drop_image_content) for entry in entries]
        chosen, results = entries, echoes
        paths = parameters.access_paths or _own_access_paths(encoder)
        if paths != ["r"]:
            pairs = list(descend(entries, echoes, paths))
            check_count(len(pairs), most)
            chosen, results = [entry for entry, _ in pairs], [result for _, result in pairs]
        items, unfit = to_items(chosen)
        message = encode_request(
            items, encoder.name, parameters.normalize, parameters.minibatch_size
        )
        encoded = await self._ask(message, request)
        embeddings = np.frombuffer(encoded.embeddings, "<f4").reshape(encoded.count, encoded.dim)
        errors = {error.index: error.message for error in encoded.errors} | unfit
        as_base64 = parameters.encoding_format == "base64"
        for index, result in enumerate(results):
            if index in errors:
                result["error"] = errors[index]
            elif as_base64:
                result["embedding"] = base64.b64encode(embeddings[index]).decode()
            else:
                result["embedding"] = embeddings[index]
        return echoes, encoded.truncated

    async def _rank(self, call: JsonCall, encoder: FlowExecutor, request: Request) -> list[Any]:
        if call.parameters.access_paths not in (None, ["r"]):
            raise RequestError(
                "access_paths: to rank, the matches of the entries of data are ranked, '@r'"
            )
        call.refuse_unknown_parameters()
        entries = call.required_entries()
        check_count(len(entries), self._listener.router.max_request_items)
        ranked = (self._rank_entry(entry, call, encoder, request) for entry in entries)
        return list(await asyncio.gather(*ranked))

    async def _rank_entry(
        self, entry: Any, call: JsonCall, encoder: FlowExecutor, request: Request
    ) -> dict[str, Any]:
        matches = entry.get("matches") if isinstance(entry, Mapping) else None
        if not isinstance(matches, list):
            raise RequestError(
                'to rank, each entry of data has "matches", a list of what to rank for it'
            )
        check_count(len(matches) + 1, self._listener.router.max_request_items)
        result = echo(entry, call.drop_image_content)
        results = result.pop("matches")
        if fault := find_fault(entry):
            return {**result, "error": fault}
        candidates, unfit = to_items(matches)
        message = pb.RankRequest(query=to_item(entry), candidates=candidates, model=encoder.name)
        try:
            ranked = await self._ask(pb.Request(rank=message), request)
        except RequestError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            return {**result, "error": str(error)}
        for match in ranked.matches:
            results[match.index]["scores"] = call.show_scores(
                {"clip_score": match.probability, "clip_score_cosine": match.cosine}
            )
        for failed in ranked.errors:
            results[failed.index]["error"] = unfit.get(failed.index, failed.message)
        order = [*(each.index for each in ranked.matches), *(each.index for each in ranked.errors)]
        return {**result, "matches": [results[index] for index in order]}


def _encoder_alone(call: JsonCall, route: Route) -> FlowExecutor | None:
    """The encoder, if it alone answers, and by one of the endpoints of clip.v1."""
    encoder = route.encoder
    if encoder is None or not route.is_direct or call.target:
        return None
    is_its_own = route.endpoint in encoder.endpoints and route.endpoint not in (*_ENCODE, _RANK)
    return None if is_its_own else encoder


def _own_access_paths(encoder: FlowExecutor) -> list[str]:
    """The paths in the flow's YAML."""
    configured = encoder.info.access_paths if encoder.info else ""
    return parse_access_paths(configured or "@r")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
