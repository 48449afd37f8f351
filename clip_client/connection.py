"""A Client's way to its server: opened at the first request, kept, and reopened when it broke."""

from __future__ import annotations

import asyncio
import os
import random
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

from clip_client import background, content
from clip_client.address import Address
from clip_client.errors import DeadlineExceededError, server_error
from clip_client.proto import clip_pb2
from clip_client.transports import opener
from clip_client.transports.base import ConnectionLostError, Transport

_READERS = 8
_MOST_MILLISECONDS = 2**32 - 1


class Connection:
    """Sends requests on the shared event loop and reads pictures in a few threads.

    Thread-safe. A forked child opens its own.
    """

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self.address = address
        self._headers = headers
        # Imports its libraries here, in the caller's thread, and not on the event loop.
        self._open_transport = opener(address.scheme)
        self._pid = 0
        self._closed = False
        self._transport: Transport | None = None
        self._closer: weakref.finalize[..., Connection] | None = None
        self._readers = _reader_pool()

    def send(self, request: clip_pb2.Request, timeout: float | None) -> Future[clip_pb2.Response]:
        """The answer, within `timeout` seconds. The future raises the answer's error."""
        if self._closed:
            raise RuntimeError("this Client is closed")
        return background.submit(self._exchange(request, timeout))

    def read(self, read: content.Read) -> Future[clip_pb2.Item]:
        """The item that `read` gives, read in one of the threads for it."""
        if self._closed:
            raise RuntimeError("this Client is closed")
        return self._readers.submit(read)

    def close(self) -> Future[None] | None:
        """Closes what is open; requests under way fail. The future tells when it is done."""
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)
        closing: Future[None] | None = self._closer() if self._closer else None
        return closing

    async def _exchange(
        self, request: clip_pb2.Request, timeout: float | None
    ) -> clip_pb2.Response:
        request.timeout = min(round(1000 * timeout), _MOST_MILLISECONDS) if timeout else 0
        try:
            response = await asyncio.wait_for(self._accepted(request), timeout)
        except asyncio.TimeoutError:
            raise DeadlineExceededError(
                f"{self.address} did not answer within {timeout:g} s (see `timeout`)"
            ) from None
        if response.HasField("error"):
            code = clip_pb2.Error.Code.Name(response.error.code)
            raise server_error(code, response.error.message)
        return response

    async def _accepted(self, request: clip_pb2.Request) -> clip_pb2.Response:
        """The answer, tried again as long as the server is full."""
        while True:
            response = await self._attempt(request)
            if not response.HasField("error") or not response.error.retry_after:
                return response
            # Spread out, or all that were refused at once would be back at once.
            await asyncio.sleep(response.error.retry_after / 1000 * random.uniform(0.5, 1.5))

    async def _attempt(self, request: clip_pb2.Request) -> clip_pb2.Response:
        transport = self._open()
        try:
            return await transport.send(request)
        except ConnectionLostError:
            # No request changes anything on the server, so sending one twice does no harm.
            return await transport.send(request)

    def _open(self) -> Transport:
        # Only ever on the event loop, so no two of them open one.
        if self._transport is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._transport = self._open_transport(self.address, self._headers)
            self._closer = weakref.finalize(self, _close, self._transport, self._pid)
        return self._transport


def _reader_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="clip-client-read")


def _close(transport: Transport, pid: int) -> Future[None] | None:
    # A forked child holds its parent's connection too, and must leave it alone.
    return background.submit(transport.close()) if pid == os.getpid() else None
