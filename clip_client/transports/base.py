"""The interface of a transport: `send` and `close`.

A transport carries envelopes and knows nothing of their meaning. It lives on one event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol, TypeAlias

from clip_client.errors import ConnectionFailedError, ServerError, server_error
from clip_client.proto import clip_pb2
from clip_client.proxies import through

CONNECT_SECONDS = 10.0
# The header or metadata with a request's name in the server's log.
REQUEST_ID = "x-request-id"
# The formats of compressed requests.
Compression: TypeAlias = Literal["gzip", "deflate"]

# The code for a status whose body does not name one: mostly a proxy's answer.
STATUS_CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "UNAUTHENTICATED",
    408: "DEADLINE_EXCEEDED",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Transport(Protocol):
    """Sends a request and returns its response; many may be in flight."""

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        """The server's answer, which may be an error.

        Raises ConnectionFailedError where no answer came, and ServerError where the server
        refused the connection as such.
        """
        ...

    async def close(self) -> None: ...


def broken(error: ConnectionFailedError) -> ConnectionFailedError:
    """The error for a connection that had worked: sending it again immediately may work."""
    error.broke = True
    return error


def status_error(
    where: str, status: int, body: bytes, headers: Mapping[str, str], proxy: str | None = None
) -> ServerError:
    """The error for an HTTP status without a clip.v1 error in its body."""
    detail = body[:200].decode("utf-8", "replace").strip()
    if status == 404:
        detail = f"is this the address of a CLIP server? {detail}"
    code = STATUS_CODES.get(status, "UNKNOWN")
    message = f"{where}{through(proxy)} answered with status {status}: {detail}".rstrip(": ")
    return refusal(code, message, headers)


def refusal(code: str, message: str, headers: Mapping[str, str]) -> ServerError:
    """The error for an answer over HTTP with these headers."""
    error = server_error(code, message, headers.get(REQUEST_ID, ""))
    seconds = headers.get("retry-after", "")  # or a date, which only proxies send
    if seconds.isdecimal():
        error.retry_after = float(seconds)
    return error
