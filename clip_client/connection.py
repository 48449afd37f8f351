"""A Client's way to its server: opened at the first request, kept, and reopened when it broke."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from numbers import Real

from clip_client import background, inputs
from clip_client.address import Address
from clip_client.errors import (
    ClientClosedError,
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidInputError,
    ServerError,
    server_error,
)
from clip_client.proto import clip_pb2
from clip_client.proxies import environment_proxy
from clip_client.tls import Trust, explain
from clip_client.transports import opener
from clip_client.transports.base import Transport

Failure = ConnectionFailedError | ServerError
log = logging.getLogger("clip_client")

_READERS = 8
_MAX_TIMEOUT_MS = 2**32 - 1
# How often one request is sent while the connection breaks each time: it may be the cause.
_MAX_SENDS, _MAX_FIRST_SENDS = 6, 2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


class Connection:
    """Sends requests on the shared event loop and reads images in a few threads.

    A server that cannot be reached is tried again: for `connect_timeout` seconds as long as it
    has never answered, and then for as long as a request may take.

    Thread-safe. A forked child opens its own.
    """

    def __init__(
        self, address: Address, headers: dict[str, str], trust: Trust, connect_timeout: float
    ) -> None:
        self.address = address
        self._headers = headers
        self._trust = trust
        self._connect_timeout = connect_timeout
        # Imports its libraries here, in the caller's thread, and not on the event loop.
        self._open_transport = opener(address.scheme)
        self._pid = 0
        self._closed = False
        self._has_answered = False
        self._is_away = False
        self._transport: Transport | None = None
        self._closer: weakref.finalize[..., Connection] | None = None
        self._readers = _reader_pool()

    def send(self, request: clip_pb2.Request, timeout: float | None) -> Future[clip_pb2.Response]:
        """The answer, within `timeout` seconds. The future raises the answer's error."""
        if self._closed:
            raise ClientClosedError
        check_seconds("timeout", timeout)
        return background.submit(self._exchange(request, timeout))

    def read(self, read: inputs.Read) -> Future[clip_pb2.Item]:
        """The item that `read` gives, read in one of the threads for it."""
        if self._closed:
            raise ClientClosedError
        return self._readers.submit(read)

    def close(self) -> Future[None] | None:
        """Closes what is open; requests in flight fail. The future tells when it is done."""
        self._closed = True
        self._readers.shutdown(wait=False, cancel_futures=True)
        closing: Future[None] | None = self._closer() if self._closer else None
        return closing

    async def _exchange(
        self, request: clip_pb2.Request, timeout: float | None
    ) -> clip_pb2.Response:
        failures: list[Failure] = []
        try:
            response = await asyncio.wait_for(self._persist(request, timeout, failures), timeout)
        except asyncio.TimeoutError:
            if failures:
                raise failures[-1] from None
            raise DeadlineExceededError(
                f"{self.address} did not answer within {timeout:g} s (see `timeout`)"
            ) from None
        if response.HasField("error"):
            raise _error_in(response)
        return response

    async def _persist(
        self, request: clip_pb2.Request, timeout: float | None, failures: list[Failure]
    ) -> clip_pb2.Response:
        """The answer, tried again while the server is full or cannot be reached.

        failures: gets why each try failed.
        """
        started, sends, pause = time.monotonic(), 0, _FIRST_PAUSE
        while True:
            waited = time.monotonic() - started
            request.timeout = _milliseconds(timeout - waited) if timeout else 0
            try:
                response = await self._attempt(request)
            except (ConnectionFailedError, ServerError) as error:
                broke = isinstance(error, ConnectionFailedError) and error.broke
                sends += broke
                if broke and sends == 1:
                    continue  # at once: the server may just have closed an idle connection
                failure = await self._explained(error)
                failures.append(failure)
                patience = timeout if self._has_answered else self._first_patience(timeout)
                waited = time.monotonic() - started
                too_late = patience is not None and waited + pause > patience
                if too_late and isinstance(failure, ConnectionFailedError) and failure.away:
                    option = "timeout" if self._has_answered else "connect_timeout"
                    failure.args = (f"{failure} Tried for {waited:.1f} s (`{option}`).",)
                if too_late or not _is_passing(failure) or self._is_too_much(sends):
                    raise failure from None
                self._note_absence(failure, patience)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(1.5 * pause, _LONGEST_PAUSE)
                continue
            self._has_answered, self._is_away = True, False
            if not response.HasField("error") or not response.error.retry_after:
                return response
            # Spread out, or all that were refused at once would be back at once.
            await asyncio.sleep(response.error.retry_after / 1000 * random.uniform(0.5, 1.5))

    async def _attempt(self, request: clip_pb2.Request) -> clip_pb2.Response:
        # No request changes anything on the server, so sending one twice does no harm.
        response = await self._open().send(request)
        if response.error.code == clip_pb2.Error.UNAVAILABLE and not response.error.retry_after:
            raise _error_in(response)
        return response

    async def _explained(self, error: Failure) -> Failure:
        """The error, or a better one where it is TLS that keeps client and server apart."""
        if isinstance(error, ServerError) or not error.away or self._closed:
            return error
        if environment_proxy(str(self.address)):
            return error
        return await explain(self.address, self._trust) or error

    def _first_patience(self, timeout: float | None) -> float:
        return min(self._connect_timeout, timeout or self._connect_timeout)

    def _is_too_much(self, sends: int) -> bool:
        return sends >= (_MAX_SENDS if self._has_answered else _MAX_FIRST_SENDS)

    def _note_absence(self, error: Exception, patience: float | None) -> None:
        if self._has_answered and not self._is_away:
            self._is_away = True
            duration = "until it answers" if patience is None else f"for up to {patience:g} s"
            log.warning("%s Trying again %s.", error, duration)

    def _open(self) -> Transport:
        # Only ever on the event loop, so no two of them open one.
        if self._closed:
            raise ClientClosedError
        if self._transport is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._transport = self._open_transport(self.address, self._headers, self._trust)
            self._closer = weakref.finalize(self, _close, self._transport, self._pid)
        return self._transport


def check_seconds(name: str, seconds: float | None) -> None:
    """Raises InvalidInputError where that is not a time, or no limit (None)."""
    if seconds is None or (isinstance(seconds, Real) and seconds > 0):
        return
    raise InvalidInputError(f"{name} is a number of seconds above 0, or None, not {seconds!r}")


def _is_passing(error: Failure) -> bool:
    """Whether trying again may help."""
    return error.code == "UNAVAILABLE" if isinstance(error, ServerError) else error.away


def _error_in(response: clip_pb2.Response) -> ServerError:
    return server_error(clip_pb2.Error.Code.Name(response.error.code), response.error.message)


def _milliseconds(seconds: float) -> int:
    return min(max(round(1000 * seconds), 1), _MAX_TIMEOUT_MS)


def _reader_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="clip-client-read")


def _close(transport: Transport, pid: int) -> Future[None] | None:
    # A forked child holds its parent's connection too, and must leave it alone.
    return background.submit(transport.close()) if pid == os.getpid() else None
