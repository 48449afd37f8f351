"""The HTTP port: JSON as users of clip-as-service know it, or clip.v1 as protobuf."""

from __future__ import annotations

import asyncio
import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import uvicorn
from google.protobuf.message import DecodeError, Message
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clip_client.data_uri import decode_base64, has_scheme, is_data_uri
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway import json_text, search_json
from clip_server.gateway.collection import KINDS
from clip_server.gateway.listener import GRACE_SECONDS, Listener
from clip_server.gateway.metrics import exposition
from clip_server.rpc.errors import FAILED, check_count, error_response
from clip_server.rpc.request_parameters import RequestParameters
from clip_server.rpc.search_parameters import SearchParameters

PROTOBUF = "application/x-protobuf"
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "UNAVAILABLE": 503,
}
# Codes of what is not there, which clip.v1 has none for.
_NOT_THERE = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED"}
_LONGEST_ID = 1024
# The status of a body over the limit, for which trying again later does not help.
_TOO_LARGE = 413
# Of a request's line and headers.
_MOST_HEAD_BYTES = 64 << 10


class HttpListener(Listener):
    """Serves HTTP."""

    async def start(self) -> None:
        """Opens the port."""
        tls = self.options.tls
        config = uvicorn.Config(
            self._app(),
            self.hosts,
            self.port,
            http=_Protocol,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            server_header=False,
            ssl_keyfile=str(tls.key) if tls else None,
            ssl_certfile=str(tls.certificate) if tls else None,
            ssl_keyfile_password=tls.password if tls else None,
            timeout_graceful_shutdown=int(GRACE_SECONDS),
        )
        self._server = uvicorn.Server(config)
        # The gateway's process has handlers of its own.
        self._server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Accepts nothing new, lets requests in flight finish, and closes the port."""
        self._server.should_exit = True
        await self._serving

    def _app(self) -> Starlette:
        routes = [
            Route("/", self._about),
            Route("/encode", self._encode, methods=["POST"]),
            Route("/rank", self._rank, methods=["POST"]),
            *(Route(f"/{kind}", self._on_collection, methods=["POST"]) for kind in KINDS),
            Route("/post", self._post, methods=["POST"]),
            Route("/info", self._info),
            Route("/metrics", self._metrics),
            Route("/livez", self._live),
            Route("/readyz", self._ready),
        ]
        cors = [Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"],
                           allow_headers=["*"])] if self.options.cors else []  # fmt: skip
        return Starlette(
            routes=routes,
            middleware=cors,
            exception_handlers={
                RequestError: _refuse,
                404: _not_found,
                405: _not_found,
                500: _failed,
            },
        )

    async def _about(self, _: Request) -> Response:
        return _json({"service": "CLIP as a microservice", "endpoints": _ENDPOINTS})

    async def _live(self, _: Request) -> Response:
        return _json({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        """Ready is what has just encoded something."""
        probe = pb.EncodeRequest(items=[pb.Item(text="ready?")])
        response = await self.call(pb.Request(encode=probe))
        if response.HasField("error"):
            return _error(503, "UNAVAILABLE", response.error.message)
        return _json({"status": "ready"})

    async def _metrics(self, _: Request) -> Response:
        text = exposition(await self.router.metrics())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _info(self, request: Request) -> Response:
        asked = pb.InfoRequest(model=request.query_params.get("model", ""))
        info = await self._answer("info", asked, request)
        if PROTOBUF in request.headers.get("accept", ""):
            return Response(info.SerializeToString(), media_type=PROTOBUF)
        return _json(_fields(info))

    async def _encode(self, request: Request) -> Response:
        body = await self._body(request)
        if _is_protobuf(request):
            return await self._answer_protobuf("encode", pb.EncodeRequest, body, request)
        return await self._encode_json(_parse(body), request)

    async def _rank(self, request: Request) -> Response:
        body = await self._body(request)
        if _is_protobuf(request):
            return await self._answer_protobuf("rank", pb.RankRequest, body, request)
        return await self._rank_json(_parse(body), request)

    async def _post(self, request: Request) -> Response:
        """Jina's own route, which names the endpoint in the body."""
        body = _parse(await self._body(request))
        endpoint = body.get("execEndpoint", body.get("exec_endpoint", "/"))
        if endpoint in ("/", "/encode"):
            return await self._encode_json(body, request)
        if endpoint == "/rank":
            return await self._rank_json(body, request)
        searching = [f"/{kind}" for kind in KINDS] if self.router.collection else []
        if endpoint in searching:
            return await self._collection_json(endpoint.removeprefix("/"), body, request)
        allowed = ", ".join(["/", "/encode", "/rank", *searching])
        raise RequestError(f"execEndpoint {endpoint!r}: the allowed are {allowed}")

    async def _on_collection(self, request: Request) -> Response:
        kind = request.url.path.removeprefix("/")
        body = await self._body(request)
        if _is_protobuf(request):
            form = getattr(pb, f"{kind.capitalize()}Request")
            return await self._answer_protobuf(kind, form, body, request)
        return await self._collection_json(kind, _parse(body), request)

    async def _collection_json(
        self, kind: str, body: Mapping[str, Any], asked_in: Request
    ) -> Response:
        if kind == "index":
            return await self._index_json(body, asked_in)
        if kind == "search":
            return await self._search_json(body, asked_in)
        message: Message = (
            search_json.delete_request(body)
            if kind == "delete"
            else search_json.count_request(body)
        )
        return _json({"count": (await self._answer(kind, message, asked_in)).count})

    async def _index_json(self, body: Mapping[str, Any], asked_in: Request) -> Response:
        SearchParameters.parse(body.get("parameters"), refuse_unknown=True)
        docs = _docs(body)
        check_count(len(docs), self.router.max_request_items)
        unfit = _unfit_entries(docs)
        items = [pb.Item() if index in unfit else _item(doc) for index, doc in enumerate(docs)]
        for index, (item, doc) in enumerate(zip(items, docs, strict=True)):
            if index not in unfit and (why := search_json.add_details(item, doc)):
                unfit[index] = why
                item.Clear()
        request = pb.IndexRequest(items=items, embeddings=search_json.embeddings_of(docs))
        answer = await self._answer("index", request, asked_in)
        errors = {error.index: error.message for error in answer.errors} | unfit
        data = [
            {"id": row_id} if index not in errors else {"error": errors[index]}
            for index, row_id in enumerate(answer.ids)
        ]
        return _json({"data": data, "truncated": answer.truncated})

    async def _search_json(self, body: Mapping[str, Any], asked_in: Request) -> Response:
        docs = _docs(body)
        check_count(len(docs), self.router.max_request_items)
        request = SearchParameters.parse(body.get("parameters"), refuse_unknown=True).to_request()
        unfit = _unfit_entries(docs)
        request.queries.extend(
            pb.Item() if index in unfit else _item(doc) for index, doc in enumerate(docs)
        )
        request.embeddings = search_json.embeddings_of(docs)
        answer = await self._answer("search", request, asked_in)
        errors = {error.index: error.message for error in answer.errors} | unfit
        data = []
        for index, (doc, found) in enumerate(zip(docs, answer.results, strict=True)):
            result = _echo(doc, drop_content=False)
            if index in errors:
                result["error"] = errors[index]
            else:
                result["matches"] = [search_json.match(hit, answer.metric) for hit in found.hits]
            data.append(result)
        return _json({"data": data, "truncated": answer.truncated})

    async def _body(self, request: Request) -> bytes:
        most = self.options.max_request_bytes
        chunks: list[bytes] = []
        size = int(request.headers.get("content-length") or 0)
        if size <= most:
            size = 0
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    break
        if size > most:
            raise BodyTooLargeError(
                f"the body has more than {most / 2**20:.0f} MiB, the most the server takes: "
                "send fewer items a request, as the client does by itself"
            )
        return b"".join(chunks)

    async def _answer(self, kind: str, message: Any, asked_in: Request) -> Any:
        """The answer to `message`, given up when the client goes away."""
        answering = asyncio.ensure_future(self.call(pb.Request(**{kind: message})))
        leaving = asyncio.ensure_future(_disconnect(asked_in))
        try:
            await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                raise ClientDisconnect
            response = answering.result()
        finally:
            answering.cancel()
            leaving.cancel()
        if response.HasField("error"):
            error = response.error
            code = pb.Error.Code.Name(error.code)
            raise RequestError(error.message, code, error.retry_after / 1e3)
        return getattr(response, kind)

    async def _answer_protobuf(
        self, kind: str, form: type[Message], body: bytes, asked_in: Request
    ) -> Response:
        try:
            message = form.FromString(body)
        except DecodeError:
            raise RequestError(f"the body is not a serialized {form.__name__}") from None
        answer = await self._answer(kind, message, asked_in)
        return Response(answer.SerializeToString(), media_type=PROTOBUF)

    async def _encode_json(self, body: Mapping[str, Any], asked_in: Request) -> Response:
        docs = _docs(body)
        # Before any of them is looked at, which takes time that others wait.
        check_count(len(docs), self.router.max_request_items)
        parameters = _parameters(body)
        options = pb.Options(
            normalize=parameters.normalize, minibatch_size=parameters.minibatch_size
        )
        unfit = _unfit_entries(docs)
        items = [pb.Item() if index in unfit else _item(doc) for index, doc in enumerate(docs)]
        request = pb.EncodeRequest(items=items, options=options)
        answer = await self._answer("encode", request, asked_in)
        embeddings = np.frombuffer(answer.embeddings, "<f4").reshape(answer.count, answer.dim)
        errors = {error.index: error.message for error in answer.errors} | unfit
        as_base64 = parameters.encoding_format == "base64"
        data = []
        for index, doc in enumerate(docs):
            result = _echo(doc, parameters.drop_image_content)
            if index in errors:
                result["error"] = errors[index]
            elif as_base64:
                result["embedding"] = base64.b64encode(embeddings[index].tobytes()).decode()
            else:
                result["embedding"] = embeddings[index]
            data.append(result)
        return _json({"data": data, "truncated": answer.truncated})

    async def _rank_json(self, body: Mapping[str, Any], asked_in: Request) -> Response:
        _parameters(body)
        docs = _docs(body)
        check_count(len(docs), self.router.max_request_items)
        ranked = await asyncio.gather(*(self._rank_doc(doc, asked_in) for doc in docs))
        return _json({"data": ranked})

    async def _rank_doc(self, doc: Any, asked_in: Request) -> dict[str, Any]:
        matches = doc.get("matches") if isinstance(doc, Mapping) else None
        if not isinstance(matches, list):
            raise RequestError(
                'to rank, each entry of data has "matches", a list of what to rank for it'
            )
        check_count(len(matches) + 1, self.router.max_request_items)
        if query_unfit := _unfit(doc):
            return {**_echo(doc, drop_content=False), "error": query_unfit}
        unfit = _unfit_entries(matches)
        items = [pb.Item() if index in unfit else _item(each) for index, each in enumerate(matches)]
        request = pb.RankRequest(query=_item(doc), candidates=items)
        try:
            answer = await self._answer("rank", request, asked_in)
        except RequestError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            return {**_echo(doc, drop_content=False), "error": str(error)}
        ranked = [
            {
                **_echo(matches[match.index], drop_content=False),
                "scores": {
                    "clip_score": {"value": match.probability},
                    "clip_score_cosine": {"value": match.cosine},
                },
            }
            for match in answer.matches
        ]
        failed = [
            {
                **_echo(matches[error.index], drop_content=False),
                "error": unfit.get(error.index, error.message),
            }
            for error in answer.errors
        ]
        return {**_echo(doc, drop_content=False), "matches": ranked + failed}


class _Protocol(HttpToolsProtocol):
    """Refuses headers without end, which httptools itself would gather for ever."""

    # What came since the last part of a body, or the end of a request.
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > _MOST_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The headers are too large.")

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()


class BodyTooLargeError(RequestError):
    """A body over the limit."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "RESOURCE_EXHAUSTED")


_ENDPOINTS = {
    "POST /encode": '{"data": [{"text": "a cat"}, {"uri": "data:image/png;base64,..."}]}',
    "POST /rank": '{"data": [{"uri": "data:...", "matches": [{"text": "a cat"}]}]}',
    "POST /index": '{"data": [{"id": "1", "text": "a cat", "tags": {"colour": "red"}}]}',
    "POST /search": '{"data": [{"text": "a cat"}], "parameters": {"limit": 10}}',
    "POST /delete": '{"ids": ["1"]}',
    "POST /count": '{"parameters": {"target": "images"}}',
    "GET /info": "the model and the limits",
    "GET /metrics": "what the encoders have done, for Prometheus",
    "GET /livez": "whether the process runs",
    "GET /readyz": "whether it encodes",
}


def _fields(message: Message) -> dict[str, Any]:
    """A message as JSON, without the messages in it that are absent."""
    fields = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {
        name: _fields(value) if isinstance(value, Message) else value
        for name, value in fields.items()
        if not isinstance(value, Message) or message.HasField(name)
    }


def _parse(body: bytes) -> dict[str, Any]:
    parsed = json_text.loads(body)
    if not isinstance(parsed, dict):
        raise RequestError('the body is not a JSON object like {"data": [{"text": "a cat"}]}')
    return parsed


def _docs(body: Mapping[str, Any]) -> list[Any]:
    docs = body.get("data")
    if isinstance(docs, dict):  # Jina's older {"data": {"docs": [...]}}
        docs = docs.get("docs")
    if not isinstance(docs, list):
        raise RequestError('"data" is not a list like [{"text": "a cat"}]')
    return docs


def _parameters(body: Mapping[str, Any]) -> RequestParameters:
    parameters = RequestParameters.parse(body.get("parameters"), refuse_unknown=True)
    if parameters.access_paths not in (None, "@r", "r"):
        raise RequestError(
            f"access_paths is {parameters.access_paths[:60]!r}: over HTTP the entries of data "
            "alone are encoded, '@r'"
        )
    return parameters


def _unfit_entries(docs: list[Any]) -> dict[int, str]:
    return {index: why for index, doc in enumerate(docs) if (why := _unfit(doc))}


def _unfit(doc: Any) -> str | None:
    """Why an entry cannot be answered, whatever its content is."""
    if isinstance(doc, str):
        return _not_unicode("text", doc)
    if not isinstance(doc, Mapping):
        return None
    for field in ("text", "uri", "blob", "image"):
        if isinstance(doc.get(field), str) and (why := _not_unicode(field, doc[field])):
            return why
    return _unfit_id(doc.get("id")) or _unfit_tags(doc.get("tags"))


def _unfit_id(value: Any) -> str | None:
    is_scalar = value is None or isinstance(value, (str, int, float))
    if is_scalar and not isinstance(value, bool) and len(str(value)) <= _LONGEST_ID:
        return None
    return f"the id is not a string or a number of at most {_LONGEST_ID:,} characters"


def _unfit_tags(tags: Any) -> str | None:
    if tags is not None and not isinstance(tags, dict):
        return 'the tags are not an object like {"colour": "red"}'
    if json_text.is_nested(tags or {}):
        return f"the tags are nested more than {json_text.MOST_NESTED} deep"
    return None


def _not_unicode(field: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"the {field} is not valid Unicode at character {error.start}: half of a surrogate "
            "pair, or a byte that is not UTF-8; send the whole character"
        )
    return None


def _item(doc: Any) -> pb.Item:
    """An entry of `data` as an item. One that is unfit stays empty, which is an error of
    that item alone."""
    if isinstance(doc, str):
        return pb.Item(uri=doc) if is_data_uri(doc) else pb.Item(text=doc)
    if not isinstance(doc, Mapping):
        return pb.Item()
    given = [key for key in ("text", "uri", "blob", "image") if isinstance(doc.get(key), str)]
    # Clients with a fixed set of fields leave empty those that do not apply.
    filled = [key for key in given if doc[key].strip()]
    for key in filled or given:
        return _of_kind(key, doc[key])
    return pb.Item()


def _of_kind(key: str, value: str) -> pb.Item:
    if key == "text":
        return pb.Item(text=value)
    if key == "uri" or has_scheme(value):
        return pb.Item(uri=value)
    try:
        return pb.Item(image=decode_base64(value))
    except ValueError:
        return pb.Item(uri="data:image/*;base64,!")  # the encoder says what is wrong


def _echo(doc: Any, drop_content: bool) -> dict[str, Any]:
    """What of an entry comes back beside its result: never a picture's own bytes twice."""
    if not isinstance(doc, Mapping):
        return {"text": doc} if isinstance(doc, str) and not is_data_uri(doc) else {}
    kept = {key: doc[key] for key in ("id", "text", "tags") if key in doc}
    if _unfit_id(kept.get("id")):
        del kept["id"]
    if _unfit_tags(kept.get("tags")):
        del kept["tags"]
    if not isinstance(kept.get("text", ""), str):
        del kept["text"]
    uri = doc.get("uri")
    if isinstance(uri, str) and not drop_content and len(uri) <= 1024:
        kept["uri"] = uri
    return kept


async def _disconnect(request: Request) -> None:
    """Returns when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass  # a body that no one asked for


def _is_protobuf(request: Request) -> bool:
    return request.headers.get("content-type", "").split(";")[0].strip() == PROTOBUF


def _json(content: Any, status: int = 200) -> Response:
    return Response(json_text.dumps(content), status, media_type="application/json")


def _error(status: int, code: str, message: str) -> Response:
    return _json({"error": {"code": code, "message": message}}, status)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    status = _STATUS.get(error.code, 500)
    if isinstance(error, BodyTooLargeError):
        status = _TOO_LARGE
    if _is_protobuf(request):
        body = error_response(0, error).error.SerializeToString()
        response = Response(body, status, media_type=PROTOBUF)
    else:
        response = _error(status, error.code, str(error))
    if error.retry_after:
        response.headers["Retry-After"] = str(math.ceil(error.retry_after))
    if status == _TOO_LARGE:
        response.headers["Connection"] = "close"  # the rest of the body is not read
    return response


async def _not_found(request: Request, error: Exception) -> Response:
    allowed = ", ".join(_ENDPOINTS)
    message = f"no {request.method} {request.url.path} here; there is {allowed}"
    status = getattr(error, "status_code", 404)
    response = _error(status, _NOT_THERE[status], message)
    response.headers.update(getattr(error, "headers", None) or {})  # which methods are allowed
    return response


async def _failed(_: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)
    return _error(500, "INTERNAL", FAILED)
