"""clip.v1 as a gRPC service, the same at the gateway and at each executor."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from clip_client.proto import clip_pb2 as pb
from clip_server.rpc.multiplexing import Call, StreamServer

SERVICE = pb.DESCRIPTOR.services_by_name["Clip"].full_name


def clip_handlers(call: Call, streams: StreamServer) -> grpc.GenericRpcHandler:
    """The service's methods: unary ones answered by `call`, the stream by `streams`."""

    def unary(kind: str) -> grpc.RpcMethodHandler[Any, Any]:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            seconds = context.time_remaining()
            timeout = round(1000 * max(0.001, min(seconds, 1e6))) if seconds else 0
            response = await call(pb.Request(**{kind: request}, timeout=timeout))
            if response.HasField("error"):
                await _abort(context, response.error)
            return getattr(response, kind)

        name = kind.capitalize()
        return grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=getattr(pb, f"{name}Request").FromString,
            response_serializer=getattr(pb, f"{name}Response").SerializeToString,
        )

    async def stream(
        messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await streams.serve(messages, context.write)

    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Encode": unary("encode"),
            "Rank": unary("rank"),
            "Info": unary("info"),
            # Serialized on both sides: the envelope is the stream's own affair.
            "Stream": grpc.stream_stream_rpc_method_handler(stream),
        },
    )


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: pb.Error) -> None:
    # gRPC's own way to say when to try again.
    pushback = (("grpc-retry-pushback-ms", str(error.retry_after)),) if error.retry_after else ()
    code = grpc.StatusCode[pb.Error.Code.Name(error.code)]
    await context.abort(code, error.message, pushback)
