"""clip.v1 as a gRPC service, the same at the gateway and at each executor."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.rpc.errors import FAILED, request_error
from clip_server.rpc.message_fields import refuse_many_fields
from clip_server.rpc.multiplexing import Call, StreamServer

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Clip"].full_name

Context = grpc.aio.ServicerContext[Any, Any]

# Given an endpoint and the context of a call for it: observes the call. The `code` of what it
# yields is set to that of an error.
Observe = Callable[[str, Context], AbstractContextManager[Any]]

_UNARY = ("encode", "rank", "info", "index", "search", "delete", "count")


def unobserved(_endpoint: str, _context: Context) -> AbstractContextManager[Any]:
    """Observes nothing."""
    return nullcontext(SimpleNamespace())


def clip_handlers(
    call: Call,
    streams: StreamServer,
    observe: Observe = unobserved,
    begin: Callable[[Context], None] = lambda _: None,
) -> grpc.GenericRpcHandler:
    """The service's methods.

    call, observe: answers and observes the unary ones.
    streams: answers the stream.
    begin: called with the context of a stream that begins.
    """

    def unary(kind: str) -> grpc.RpcMethodHandler[Any, Any]:
        form = getattr(pb, f"{kind.capitalize()}Request")

        async def answer(message: bytes, context: Context) -> bytes:
            seconds = context.time_remaining()
            timeout = round(1000 * max(0.001, min(seconds, 1e6))) if seconds else 0
            request = pb.Request(**{kind: parse(form, message)}, timeout=timeout)
            response = await call(request)
            if response.HasField("error"):
                raise request_error(response.error)
            serialized: bytes = getattr(response, kind).SerializeToString()
            return serialized

        return unary_handler(answer, f"/{kind}", observe)

    async def stream(messages: AsyncIterator[bytes], context: Context) -> None:
        begin(context)
        await streams.serve(messages, context.write)

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            **{kind.capitalize(): unary(kind) for kind in _UNARY},
            "Stream": grpc.stream_stream_rpc_method_handler(stream),
        },
    )


def unary_handler(
    answer: Callable[[bytes, Context], Awaitable[bytes]],
    endpoint: str = "",
    observe: Observe = unobserved,
) -> grpc.RpcMethodHandler[Any, Any]:
    """A method whose messages are serialized on both sides.

    gRPC's own deserializing answers what it cannot read with UNKNOWN and the name of a class. A
    RequestError of `answer` becomes a status, and any other exception INTERNAL.
    """

    @functools.wraps(answer)
    async def guarded(message: bytes, context: Context) -> bytes:
        with observe(endpoint, context) as observed:
            try:
                return await answer(message, context)
            except RequestError as error:
                refusal = error
            except Exception:
                log.exception("a request failed")
                refusal = RequestError(FAILED, "INTERNAL")
            observed.code = refusal.code
            await abort(context, refusal)
            raise AssertionError("abort() returned")

    return grpc.unary_unary_rpc_method_handler(guarded)


def parse(form: type[Any], message: bytes) -> Any:
    """A message of this form.

    Raises:
        RequestError: it is not one, or has too many fields.
    """
    refuse_many_fields(message, form.DESCRIPTOR)
    try:
        return form.FromString(message)
    except DecodeError:
        name = form.DESCRIPTOR.full_name
        raise RequestError(f"the message is not a serialized {name}") from None


async def abort(context: Context, error: RequestError) -> None:
    """Ends a call with the status of `error`."""
    retry_after = round(error.retry_after * 1e3)
    # gRPC's own way to say when to try again.
    pushback = (("grpc-retry-pushback-ms", str(retry_after)),) if retry_after else ()
    trailing = (*context.trailing_metadata(), *pushback)
    await context.abort(grpc.StatusCode[error.code], str(error), trailing)
