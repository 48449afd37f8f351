"""clip.v1 as a gRPC service, the same at the gateway and at each executor."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.rpc.errors import FAILED, error_response
from clip_server.rpc.multiplexing import Call, StreamServer

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Clip"].full_name

Context = grpc.aio.ServicerContext[Any, Any]

_UNARY = ("encode", "rank", "info", "index", "search", "delete", "count")


def clip_handlers(call: Call, streams: StreamServer) -> grpc.GenericRpcHandler:
    """The service's methods: unary ones answered by `call`, the stream by `streams`."""

    def unary(kind: str) -> grpc.RpcMethodHandler[Any, Any]:
        form = getattr(pb, f"{kind.capitalize()}Request")

        async def answer(message: bytes, context: Context) -> bytes:
            seconds = context.time_remaining()
            timeout = round(1000 * max(0.001, min(seconds, 1e6))) if seconds else 0
            request = pb.Request(**{kind: parse(form, message)}, timeout=timeout)
            response = await call(request)
            if response.HasField("error"):
                await _abort(context, response.error)
            serialized: bytes = getattr(response, kind).SerializeToString()
            return serialized

        return unary_handler(answer)

    async def stream(messages: AsyncIterator[bytes], context: Context) -> None:
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
) -> grpc.RpcMethodHandler[Any, Any]:
    """A method whose messages are serialized on both sides.

    gRPC's own deserializing answers what it cannot read with UNKNOWN and the name of a class. A
    RequestError of `answer` becomes a status, and any other exception INTERNAL.
    """

    @functools.wraps(answer)
    async def guarded(message: bytes, context: Context) -> bytes:
        try:
            return await answer(message, context)
        except RequestError as error:
            await abort(context, error)
        except grpc.aio.AbortError:
            raise
        except Exception:
            log.exception("a request failed")
            await abort(context, RequestError(FAILED, "INTERNAL"))
        raise AssertionError("abort() returned")

    return grpc.unary_unary_rpc_method_handler(guarded)


def parse(form: type[Any], message: bytes) -> Any:
    """A message of this form.

    Raises:
        RequestError: it is not one.
    """
    try:
        return form.FromString(message)
    except DecodeError:
        name = form.DESCRIPTOR.full_name
        raise RequestError(f"the message is not a serialized {name}") from None


async def abort(context: Context, error: RequestError) -> None:
    """Ends a call with the status of `error`."""
    await _abort(context, error_response(0, error).error)


async def _abort(context: Context, error: pb.Error) -> None:
    # gRPC's own way to say when to try again.
    pushback = (("grpc-retry-pushback-ms", str(error.retry_after)),) if error.retry_after else ()
    code = grpc.StatusCode[pb.Error.Code.Name(error.code)]
    await context.abort(code, error.message, pushback)
