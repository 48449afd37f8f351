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


Call = Callable[[pb.Request], Awaitable[pb.Response]]


class Streams:
    """The connections of one listener that carry many requests at once."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._readers: set[asyncio.Task[None]] = set()

    def drain(self) -> None:
        """Reads no further requests; what is under way is still answered."""
        for reader in self._readers:
            reader.cancel()

    async def answer(
        self, requests: AsyncIterator[bytes], send: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Answers serialized requests as they come, each as soon as it is ready.

        Cancelling, or a connection that breaks, cancels what is under way.
        """
        under_way: set[asyncio.Task[None]] = set()
        reader = asyncio.create_task(self._read(requests, send, under_way))
        self._readers.add(reader)
        try:
            await asyncio.wait([reader])
            if not reader.cancelled():
                reader.result()
            if under_way:
                await asyncio.gather(*under_way)
        finally:
            self._readers.discard(reader)
            for task in (reader, *under_way):
                task.cancel()
            await asyncio.gather(reader, *under_way, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[bytes],
        send: Callable[[bytes], Awaitable[None]],
        under_way: set[asyncio.Task[None]],
    ) -> None:
        free = asyncio.Semaphore(IN_FLIGHT)
        sending = asyncio.Lock()  # gRPC takes one write at a time

        async def answer(message: bytes) -> None:
            try:
                response = await self._respond(message)
                async with sending:
                    await send(response.SerializeToString())
            finally:
                free.release()

        async for message in requests:
            await free.acquire()
            task = asyncio.create_task(answer(message))
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    async def _respond(self, message: bytes) -> pb.Response:
        try:
            return await self._call(parse_request(message))
        except RequestError as error:
            return error_response(0, error)


def parse_request(message: bytes) -> pb.Request:
    """The request in a message. Raises RequestError where it is none."""
    try:
        return pb.Request.FromString(message)
    except DecodeError:
        raise RequestError("the message is not a serialized clip.v1 Request") from None
