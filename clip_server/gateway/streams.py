"""Many requests under way on one connection, for gRPC streams and WebSockets alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from google.protobuf.message import DecodeError

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.service import error_response

# Requests of one connection that may be under way; the next is read when one is answered.
IN_FLIGHT = 64


async def answer_all(
    requests: AsyncIterator[bytes],
    call: Callable[[pb.Request], Awaitable[pb.Response]],
    send: Callable[[bytes], Awaitable[None]],
) -> None:
    """Answers serialized requests as they come, each as soon as it is ready.

    Cancelling, or a connection that ends, cancels what is under way.
    """
    free = asyncio.Semaphore(IN_FLIGHT)
    sending = asyncio.Lock()

    async def answer(message: bytes) -> None:
        try:
            response = await call(parse_request(message))
        except RequestError as error:
            response = error_response(0, error)
        try:
            async with sending:  # gRPC takes one write at a time
                await send(response.SerializeToString())
        finally:
            free.release()

    under_way: set[asyncio.Task[None]] = set()
    try:
        async for message in requests:
            await free.acquire()
            task = asyncio.create_task(answer(message))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        # The other side sends no more, but still waits for its answers.
        if under_way:
            await asyncio.gather(*under_way)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def parse_request(message: bytes) -> pb.Request:
    """The request in a message. Raises RequestError where it is none."""
    try:
        return pb.Request.FromString(message)
    except DecodeError:
        raise RequestError("the message is not a serialized clip.v1 Request") from None
