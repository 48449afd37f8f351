"""The server's side of clip.v1's `Stream`: many requests in flight on one connection.

Gateway and executors both serve it, on gRPC streams and WebSockets. Each message carries all
requests or responses that became ready while the previous one was being sent: without a timer,
the higher the load, the less each costs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress

from google.protobuf.message import DecodeError

from clip_client.envelope import serialize_messages
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.rpc.errors import error_response
from clip_server.rpc.message_fields import refuse_many_fields

Call = Callable[[pb.Request], Awaitable[pb.Response]]
Send = Callable[[bytes], Awaitable[None]]
# Items started before responses that are ready are sent. Otherwise client, gateway and executor
# would handle large requests one after the other, each waiting for the others.
_MAX_STARTED_BEFORE_FLUSH = 128
# Bytes of embeddings that wait to be sent, beyond which no more requests are begun: a client that
# does not read its responses would fill the memory.
_MOST_UNSENT_BYTES = 32 << 20


def parse_requests(message: bytes) -> Sequence[pb.Request]:
    """The requests in serialized `Requests`.

    Raises:
        RequestError: there are none, or the message has too many fields.
    """
    refuse_many_fields(message, pb.Requests.DESCRIPTOR)
    with suppress(DecodeError):
        if requests := pb.Requests.FromString(message).requests:
            return requests
    raise RequestError("the message is no clip.v1 Requests")


class StreamServer:
    """Serves clip.v1's `Stream` on the connections of one listener.

    call: answers a request; an error is in the response.
    max_in_flight: requests of one connection that may be in flight, or whose responses may wait to
        be sent, before more are begun.
    draw_age: the seconds for which one connection is read; None: until its client ends it.
    """

    def __init__(
        self, call: Call, max_in_flight: int, draw_age: Callable[[], float | None] = lambda: None
    ) -> None:
        self._call = call
        self._draw_age = draw_age
        self._max_in_flight = max_in_flight
        self._readers: set[asyncio.Task[None]] = set()

    def drain(self) -> None:
        """Reads no further requests; those in flight are still answered."""
        for reader in self._readers:
            reader.cancel()

    async def serve(self, messages: AsyncIterator[bytes], send: Send) -> None:
        """Answers serialized `Requests` as they come, each request as soon as it is ready.

        Cancelling, or a connection that breaks, cancels the requests in flight.
        """
        connection = _Connection(self._call, self._max_in_flight)
        reader = asyncio.create_task(connection.read(messages))
        writer = asyncio.create_task(connection.write(send))
        self._readers.add(reader)
        age = self._draw_age()
        timer = age and asyncio.get_running_loop().call_later(age, reader.cancel)
        try:
            await asyncio.wait([reader, writer], return_when=asyncio.FIRST_COMPLETED)
            if writer.done():  # only because it failed
                writer.result()
            if not reader.cancelled():
                reader.result()
            await connection.finish()
            await writer
        finally:
            self._readers.discard(reader)
            if timer:
                timer.cancel()
            await connection.cancel(reader, writer)


class _Connection:
    def __init__(self, call: Call, max_in_flight: int) -> None:
        self._call = call
        self._max_in_flight = max_in_flight
        self._has_moved = asyncio.Event()
        self._in_flight: dict[int, asyncio.Task[None]] = {}
        self._unnumbered = 0
        self._outbox: deque[pb.Response] = deque()
        self._unsent_bytes = 0
        self._waiting = asyncio.Event()
        self._finished = self._is_closed = False

    async def read(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            requests = self._requests(message)
            del message  # or it would be kept until the next one comes
            try:
                await self._begin_all(requests)
            finally:  # none is lost when the server is draining
                for request in requests if not self._is_closed else ():
                    self._begin(request)
            await self._has_room()

    async def _begin_all(self, requests: Iterator[pb.Request]) -> None:
        begun = 0
        for request in requests:
            self._begin(request)
            begun += 1 + len(request.encode.items) + len(request.rank.candidates)
            if begun >= _MAX_STARTED_BEFORE_FLUSH:
                begun = 0
                await asyncio.sleep(0)
            await self._has_room()

    async def _has_room(self) -> None:
        """Waits while too much is in flight, or waits to be sent."""
        while (
            len(self._in_flight) + len(self._outbox) >= self._max_in_flight
            or self._unsent_bytes > _MOST_UNSENT_BYTES
        ):
            self._has_moved.clear()
            await self._has_moved.wait()

    def _requests(self, message: bytes) -> Iterator[pb.Request]:
        try:
            yield from parse_requests(message)
        except RequestError as error:
            self._put(error_response(0, error))

    def _begin(self, request: pb.Request) -> None:
        if request.HasField("cancel"):
            self._give_up(request.id)
            return
        key = request.id
        if not key or key in self._in_flight:  # it cannot be given up by its id
            self._unnumbered -= 1
            key = self._unnumbered
        self._in_flight[key] = asyncio.create_task(self._answer(key, request))

    async def _answer(self, key: int, request: pb.Request) -> None:
        answer = self._call(request)
        del request  # or its images would be in memory until it is answered
        try:
            self._put(await answer)
        finally:
            del self._in_flight[key]
            self._has_moved.set()

    def _give_up(self, request_id: int) -> None:
        if task := self._in_flight.get(request_id):
            task.cancel()

    def _put(self, response: pb.Response) -> None:
        self._outbox.append(response)
        self._unsent_bytes += _size(response)
        self._waiting.set()

    async def write(self, send: Send) -> None:
        """Sends the outbox until finished."""
        while not self._finished or self._outbox:
            await self._waiting.wait()
            self._waiting.clear()
            while self._outbox:
                await send(serialize_messages(self._drained()))
                self._has_moved.set()

    def _drained(self) -> Iterator[pb.Response]:
        while self._outbox:
            response = self._outbox.popleft()
            self._unsent_bytes -= _size(response)
            yield response

    async def finish(self) -> None:
        """Waits for the requests in flight; then the writer ends when all is sent."""
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        self._finished = True
        self._waiting.set()

    async def cancel(self, *others: asyncio.Task[None]) -> None:
        """Ends everything."""
        self._is_closed = True
        tasks = [*others, *self._in_flight.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _size(response: pb.Response) -> int:
    """Bytes of the embeddings in a response: to ask for its own size would serialize it."""
    return 4 * response.encode.count * response.encode.dim
