"""Multiplexes requests on one connection; answers are matched by `id`.

A message carries all requests that were ready when the previous message had been sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Protocol

from clip_client.envelope import serialize_messages
from clip_client.errors import ClientClosedError, ClipError, server_error
from clip_client.proto import clip_pb2


class Link(Protocol):
    """An open connection that carries envelopes in both directions."""

    async def write(self, requests: bytes) -> None: ...

    async def read(self) -> clip_pb2.Responses:
        """The next responses. Raises ClipError at the connection's end."""
        ...

    async def close(self) -> None: ...


class Multiplexer:
    """A transport over links: keeps one open, and opens another if it drops."""

    def __init__(self, open_link: Callable[[], Awaitable[Link]]) -> None:
        self._open_link = open_link
        self._closed = False
        self._opening = asyncio.Lock()
        self._connection: _Connection | None = None

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        """The answer to a request, which is released once it is sent."""
        async with self._opening:
            if self._closed:
                raise ClientClosedError
            if self._connection is None or self._connection.broken:
                self._connection = _Connection(await self._open_link())
        answer = self._connection.exchange(request)
        del request
        return await answer

    async def close(self) -> None:
        self._closed = True
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


class _Connection:
    def __init__(self, link: Link) -> None:
        self.broken = False
        self._link = link
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[clip_pb2.Response]] = {}
        self._outbox: asyncio.Queue[clip_pb2.Request] = asyncio.Queue()
        self._reader = asyncio.create_task(self._read())
        # One task writes: a caller that is cancelled must not cut a message in two, and in
        # grpc.aio a cancelled write cancels the whole call.
        self._writer = asyncio.create_task(self._write())

    async def exchange(self, request: clip_pb2.Request) -> clip_pb2.Response:
        number = request.id = next(self._ids)
        answer: asyncio.Future[clip_pb2.Response] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        self._outbox.put_nowait(request)
        del request
        try:
            return await answer
        except asyncio.CancelledError:
            self._outbox.put_nowait(clip_pb2.Request(id=number, cancel=clip_pb2.Cancel()))
            raise
        finally:
            self._pending.pop(number, None)

    async def close(self) -> None:
        tasks = self._reader, self._writer
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        # They keep the frames in which they were cancelled, with a call: only when nothing refers
        # to it any more does gRPC close its connection.
        del self._reader, self._writer

    async def _write(self) -> None:
        # The reader sees the same break, and its reason.
        with contextlib.suppress(Exception):
            while True:
                # Without a name for the requests, which would keep them until the next one comes.
                await self._link.write(serialize_messages(self._from(await self._outbox.get())))

    def _from(self, request: clip_pb2.Request) -> Iterator[clip_pb2.Request]:
        """A request and those queued behind it, without those that were cancelled."""
        while True:
            if request.id in self._pending or request.HasField("cancel"):
                yield request
            if self._outbox.empty():
                return
            request = self._outbox.get_nowait()

    async def _read(self) -> None:
        failure: ClipError = ClientClosedError()
        try:
            while True:
                for response in (await self._link.read()).responses:
                    self._deliver(response)
        except ClipError as error:
            failure = error
        finally:
            self._break(failure)
            await self._link.close()

    def _deliver(self, response: clip_pb2.Response) -> None:
        if response.HasField("error") and not response.id:
            # It names no request, so it is about the connection.
            code = clip_pb2.Error.Code.Name(response.error.code)
            raise server_error(code, response.error.message, response.request_id)
        answer = self._pending.pop(response.id, None)
        # There is none for a request that was cancelled.
        if answer is not None and not answer.done():
            answer.set_result(response)

    def _break(self, failure: ClipError) -> None:
        self.broken = True
        self._writer.cancel()
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(copy.copy(failure))
