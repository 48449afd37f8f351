"""Bodies of HTTP requests in, responses and refusals out: the same in every dialect."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, TypeAlias, TypeVar

from google.protobuf.message import DecodeError, Message
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway import json_text
from clip_server.gateway.compression import (
    TooLargeError,
    UnknownEncodingError,
    inflate,
    too_large,
    window_bits,
)
from clip_server.gateway.topology import UnansweredError, UnservedModelError
from clip_server.rpc.errors import FAILED, error_response, request_error
from clip_server.rpc.message_fields import refuse_many_fields
from clip_server.rpc.multiplexing import Call

log = logging.getLogger(__name__)

PROTOBUF = "application/x-protobuf"
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "DEADLINE_EXCEEDED": 504,
    "UNAVAILABLE": 503,
}
# The status of a body over the limit, for which trying again later does not help.
_TOO_LARGE = 413
_UNKNOWN_ENCODING = 415
# The characters of a request that an answer repeats.
_LONGEST_SHOWN = 100
# The status of a request whose client is gone: it is not sent anywhere.
_CLIENT_GONE = 499

# Codes of errors that clip.v1 does not have.
_NOT_FOUND, MODEL_NOT_FOUND = "NOT_FOUND", "MODEL_NOT_FOUND"
_CODES = {
    **{status: code for code, status in _STATUS.items()},
    404: _NOT_FOUND,
    405: "METHOD_NOT_ALLOWED",
    _TOO_LARGE: "RESOURCE_EXHAUSTED",
    _UNKNOWN_ENCODING: "INVALID_ARGUMENT",
    _CLIENT_GONE: "CANCELLED",
}
# Makes the content of an error from its status, code and message.
ErrorContent: TypeAlias = Callable[[int, str, str], Any]
_Answer = TypeVar("_Answer")


async def read_body(request: Request, most: int) -> bytes:
    """The body of a request, inflated if it is compressed.

    most: bytes that it may have, before and after.

    Raises:
        TooLargeError: it has more.
        UnknownEncodingError: it is compressed in a way that the server does not know.
        RequestError: it is damaged.
        ClientDisconnect: the client went away before its end.
    """
    bits = window_bits(",".join(request.headers.getlist("content-encoding")))
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
        raise too_large(most)
    body = b"".join(chunks)
    return body if bits is None or not body else await inflate(body, bits, most)


def parse_object(body: bytes, example: str = '{"data": [{"text": "a cat"}]}') -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError if it is something else.

    example: of one, for the message.
    """
    parsed = json_text.loads(body)
    if not isinstance(parsed, dict):
        raise RequestError(f"the body is not a JSON object like {example}")
    return parsed


def parse_message(kind: str, body: bytes) -> pb.Request:
    """The request with the protobuf message in a body. Raises RequestError if it is something else.

    kind: the name of its field in `Request`.
    """
    request = pb.Request()
    message = getattr(request, kind)
    refuse_many_fields(body, message.DESCRIPTOR)
    message.SetInParent()
    try:
        message.MergeFromString(body)
    except DecodeError:
        raise RequestError(f"the body is not a serialized {type(message).__name__}") from None
    return request


def is_protobuf(request: Request) -> bool:
    """Whether the body is, and the response is to be, protobuf."""
    return request.headers.get("content-type", "").split(";")[0].strip() == PROTOBUF


async def unless_client_leaves(answer: Awaitable[_Answer], request: Request) -> _Answer:
    """Awaits `answer`, and cancels it when the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """
    task = asyncio.current_task()
    assert task is not None
    lost: asyncio.Future[None] = request.state.connection_lost
    is_awaited = True

    def give_up(_: object) -> None:
        if is_awaited:
            task.cancel()

    # Another task, for the answer or to wait for ASGI's `http.disconnect`, would cost as much as
    # the rest.
    lost.add_done_callback(give_up)
    try:
        return await answer
    except asyncio.CancelledError:
        if not lost.done():
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise ClientDisconnect from None
    finally:
        is_awaited = False
        lost.remove_done_callback(give_up)


async def ask(call: Call, message: pb.Request, request: Request) -> Any:
    """The answer to a message of clip.v1, as `unless_client_leaves`; of `Response`, the field that
    has the name of the message's.

    call: what answers it.

    Raises:
        RequestError: the answer is an error.
    """
    kind = message.WhichOneof("body")
    response = await unless_client_leaves(call(message), request)
    if response.HasField("error"):
        raise request_error(response.error)
    return getattr(response, str(kind))


def json_response(content: Any, status: int = 200) -> Response:
    """A response with JSON of plain objects and numpy's arrays."""
    return Response(json_text.dumps(content), status, media_type="application/json")


def protobuf_response(message: Message, status: int = 200) -> Response:
    """A response with a serialized message."""
    return Response(message.SerializeToString(), status, media_type=PROTOBUF)


def own_error(status: int, code: str, message: str) -> Any:
    """The content of a response that says why there is no other, in our own dialect."""
    del status
    return {"error": {"code": code, "message": message}}


def answer_errors_in(dialect: ErrorContent, scope: Scope) -> None:
    """Has errors of a request answered in another dialect than our own."""
    scope["state"]["error_content"] = dialect


def json_error(status: int, code: str, message: str, content: ErrorContent = own_error) -> Response:
    """A response that says why there is no other."""
    return json_response(content(status, code, message), status)


def error_dialect(scope: Scope) -> ErrorContent:
    """The dialect in which errors of a request are answered."""
    dialect: ErrorContent = scope.get("state", {}).get("error_content", own_error)
    return dialect


def code_of(status: int) -> str:
    """OK, or the code of an error that is answered with this status."""
    if status < 400:
        return "OK"
    return _CODES.get(status, "INVALID_ARGUMENT" if status < 500 else "INTERNAL")


def status_of(code: str) -> HTTPStatus:
    """The status with which an error of this code is answered."""
    return HTTPStatus(_STATUS.get(code, 500))


def retry_headers(error: RequestError) -> dict[str, str]:
    """The headers that say when to try again, if that helps."""
    return {"Retry-After": str(math.ceil(error.retry_after))} if error.retry_after else {}


def error_handlers(endpoints: Mapping[str, str]) -> Mapping[Any, Callable[..., Any]]:
    """Starlette's handlers for requests that raise, by exception or status.

    endpoints: listed in the answer to a request for another one.
    """

    async def not_found(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        allowed = ", ".join(endpoints)
        path = request.scope["path"][:_LONGEST_SHOWN]
        message = f"no {request.method[:_LONGEST_SHOWN]} {path} here; there is {allowed}"
        response = json_error(status, code_of(status), message, error_dialect(request.scope))
        response.headers.update(getattr(error, "headers", None) or {})  # the allowed methods
        return response

    return {
        RequestError: refuse,
        UnicodeEncodeError: _refuse_text,
        ClientDisconnect: _note_client_gone,
        404: not_found,
        405: not_found,
        500: _fail,
    }


async def refuse(request: Request, error: Exception) -> Response:
    """The response to a request that raised a RequestError."""
    assert isinstance(error, RequestError)
    status, code, dialect = int(status_of(error.code)), error.code, error_dialect(request.scope)
    if isinstance(error, TooLargeError):
        status = _TOO_LARGE
    elif isinstance(error, UnknownEncodingError):
        status = _UNKNOWN_ENCODING
    elif isinstance(error, UnansweredError):
        status, code = 404, _NOT_FOUND
    elif isinstance(error, UnservedModelError) and dialect is not own_error:
        status, code = 404, MODEL_NOT_FOUND
    if is_protobuf(request):
        response = protobuf_response(error_response(0, error).error, status)
    else:
        response = json_error(status, code, str(error), dialect)
    response.headers.update(retry_headers(error))
    if status == _TOO_LARGE:
        response.headers["Connection"] = "close"  # the rest of the body is not read
    return response


async def _refuse_text(request: Request, error: Exception) -> Response:
    """Refuses a text that fits into no message, such as an id or the name of a model."""
    assert isinstance(error, UnicodeEncodeError)
    shown = ascii(error.object[:60])
    return await refuse(
        request, RequestError(f"{shown} is not valid Unicode: it has half of a surrogate pair")
    )


async def _note_client_gone(request: Request, _: Exception) -> Response:
    log.debug("the client of %s %s went away", request.method, request.url.path)
    return Response(status_code=_CLIENT_GONE)


async def _fail(request: Request, _: Exception) -> Response:
    return json_error(500, "INTERNAL", FAILED, error_dialect(request.scope))
