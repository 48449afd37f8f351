"""Opens aiohttp sessions, for the HTTP transport and for downloading images."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping

import aiohttp

from clip_client.tls import Trust


class _Connector(aiohttp.TCPConnector):
    """Does nothing in a forked child, which holds its parent's connections too.

    To close one there would also take it out of the parent's event loop: they share the epoll.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        # Connections below 5 s idle are kept: the server's own limit is that, and a request
        # should not meet a connection that is just being closed.
        super().__init__(limit=0, ssl=context, keepalive_timeout=4)
        self._pid = os.getpid()

    @property
    def closed(self) -> bool:
        return self._closed or self._pid != os.getpid()

    def __del__(self, *_: object) -> None:
        """Without aiohttp's own, which closes: sessions here are closed by their owners."""


def open_session(
    timeout: aiohttp.ClientTimeout, trust: Trust, headers: Mapping[str, str] | None = None
) -> aiohttp.ClientSession:
    """A session of the running event loop, with any number of connections."""
    connector = _Connector(trust.context())
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


def reason(error: BaseException) -> str:
    """Describes an error; aiohttp's own message may hold a proxy's password, or half an answer."""
    if isinstance(error, aiohttp.ClientResponseError):
        return f"{error.status} {' '.join(error.message.split())}"
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the name {error.host} is not known"
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return "no connection was made in time"
    cause = getattr(error, "os_error", None) or error
    if isinstance(cause, OSError) and cause.errno and not isinstance(cause, ssl.SSLError):
        return os.strerror(cause.errno)
    if isinstance(error, (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError)):
        return str(error.__cause__ or "the server disconnected without an answer")
    return str(error) or type(error).__name__
