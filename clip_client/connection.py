"""Keeps a Client's connection to its server open: retries with backoff, and reconnects."""

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
from clip_client.transports import get_transport_factory
from clip_client.transports.base import Compression, Transport

Failure = ConnectionFailedError | ServerError
log = logging.getLogger("clip_client")

_READERS = 8
_MAX_TIMEOUT_MS = 2**32 - 1
# Attempts per request while the connection drops each time: the request may be the cause.
_MAX_SENDS, _MAX_FIRST_SENDS = 6, 2
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 1.0


class Connection:
    """Sends requests on the shared event loop, and reads images in a few threads.

    If the server cannot be reached, it retries: for `connect_timeout` seconds while the server
    has never answered, and afterwards until the request times out.

    Thread-safe. A forked child opens its own.
    """

    def __init__(
        self,
        address: Address,
        headers: dict[str, str],
        trust: Trust,
        connect_timeout: float,
        compression: Compression | None = None,
    ) -> None:
        self.address = address
        self._headers = headers
        self._trust = trust
        self._compression = compression
        self._connect_timeout = connect_timeout
        # Imports its libraries here, in the caller's thread, and not on the event loop.
        self._open_transport = get_transport_factory(address.scheme)
        self._pid = 0
        self._closed = False
        self._has_answered = False
        self._is_away = False
        self._transport: Transport | None = None
        self._closer: weakref.finalize[..., Connection] | None = None
        self._readers = _reader_pool()

    def send(self, request: clip_pb2.Request, timeout: float | None) -> Future[clip_pb2.Response]:
        """Returns a future of the answer, which raises its error or the timeout (in seconds)."""
        if self._closed:
            raise ClientClosedError
        check_seconds("timeout", timeout)
        return background.submit(self._exchange(request, timeout))

    def read(self, read: inputs.Read) -> Future[clip_pb2.Item]:
        """Runs `read` in a reader thread."""
        if self._closed:
            raise ClientClosedError
        return self._readers.submit(read)

    def close(self) -> Future[None] | None:
        """Closes the connection; requests in flight fail. The future is done when it is closed."""
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
        """Sends a request until it is answered, with backoff while the server is full or away.

        failures: collects the error of each attempt.
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
                    continue  # immediately: the server may just have closed an idle connection
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
                asked = failure.retry_after if isinstance(failure, ServerError) else 0.0
                await asyncio.sleep(max(asked, pause) * random.uniform(0.5, 1.0))
                pause = min(1.5 * pause, _LONGEST_PAUSE)
                continue
            self._has_answered, self._is_away = True, False
            if not response.HasField("error") or not response.error.retry_after:
                return response
            failures.append(_error_in(response))
            # With jitter, or all refused requests would return at the same moment.
            await asyncio.sleep(response.error.retry_after / 1000 * random.uniform(0.5, 1.5))

    async def _attempt(self, request: clip_pb2.Request) -> clip_pb2.Response:
        # No request changes anything on the server, so it is safe to send one twice.
        response = await self._open().send(request)
        if response.error.code == clip_pb2.Error.UNAVAILABLE and not response.error.retry_after:
            raise _error_in(response)
        return response

    async def _explained(self, error: Failure) -> Failure:
        """Replaces an error by a clearer one if TLS is the reason that no connection was made."""
        if isinstance(error, ServerError) or self._closed:
            return error
        # A client without the certificate that is asked for is connected first, and then cut off.
        is_cut_off = error.broke and self.address.secure and not self._has_answered
        if not (error.away or is_cut_off):
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
        # Runs on the event loop only, so two calls cannot both open a transport.
        if self._closed:
            raise ClientClosedError
        if self._transport is None or self._pid != os.getpid():
            self._pid = os.getpid()
            self._transport = self._open_transport(
                self.address, self._headers, self._trust, self._compression
            )
            self._closer = weakref.finalize(self, _close, self._transport, self._pid)
        return self._transport


def check_seconds(name: str, seconds: float | None) -> None:
    """Raises InvalidInputError unless `seconds` is positive, or None for no limit."""
    if seconds is None or (isinstance(seconds, Real) and seconds > 0):
        return
    raise InvalidInputError(f"{name} is a number of seconds above 0, or None, not {seconds!r}")


def _is_passing(error: Failure) -> bool:
    """Whether a retry may help."""
    if isinstance(error, ConnectionFailedError):
        return error.away
    return error.code == "UNAVAILABLE" or error.retry_after > 0


def _error_in(response: clip_pb2.Response) -> ServerError:
    code = clip_pb2.Error.Code.Name(response.error.code)
    return server_error(code, response.error.message, response.request_id)


def _milliseconds(seconds: float) -> int:
    return min(max(round(1000 * seconds), 1), _MAX_TIMEOUT_MS)


def _reader_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="clip-client-read")


def _close(transport: Transport, pid: int) -> Future[None] | None:
    # A forked child holds its parent's connection too, and must leave it alone.
    return background.submit(transport.close()) if pid == os.getpid() else None
