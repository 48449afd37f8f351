"""Access: each request shows a key before its body is read, on every protocol; and the items in
flight of each key are counted."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import grpc
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from clip_server.errors import RequestError
from clip_server.gateway.http_messages import error_dialect, json_error
from clip_server.keys.keyring import KeyRing
from clip_server.launch.gateway_group import SharedCounts
from clip_server.rpc.grpc_service import Context, abort

# Headers that hold the key alone, as clients of other embedding services send it.
_PLAIN_HEADERS = ("x-api-key", "api-key")
# Ours, and those by which other servers' APIs ask the same.
_OPEN_PATHS = (
    "/livez",
    "/readyz",
    "/health",
    "/ping",
    "/.well-known/live",
    "/.well-known/ready",
)
_METRICS_PATH = "/metrics"
_OPEN_SERVICE = "/grpc.health.v1.Health/"
# Of an answer with status 401.
CHALLENGE = {"WWW-Authenticate": 'Bearer, Basic realm="CLIP", charset="UTF-8"'}
_RETRY_SECONDS = 1.0
_HOW = (
    "send the header `authorization: Bearer <key>`, with the Python client Client(..., "
    "credential='<key>') or CLIP_AUTH_TOKEN"
)


class Access:
    """Knows who may call.

    keyring: the keys that are allowed; None: callers need none.
    public_metrics: whether `/metrics` needs no key.
    counts: the items in flight of each key, those of other gateways too.
    """

    def __init__(
        self,
        keyring: KeyRing | None = None,
        public_metrics: bool = False,
        counts: SharedCounts | None = None,
    ) -> None:
        self._keyring, self._counts = keyring, counts or SharedCounts()
        self._open_paths = {*_OPEN_PATHS, *([_METRICS_PATH] if public_metrics else [])}

    def is_open(self, path: str) -> bool:
        """Whether an HTTP path needs no key."""
        return path in self._open_paths

    def identify(self, headers: Mapping[str, str]) -> None:
        """Finds the key of the request or connection that the current task serves.

        headers: by lower-case names.

        Raises:
            RequestError: UNAUTHENTICATED: there is none, or it is not allowed.
        """
        if self._keyring is None:
            return
        secret = _secret(headers)
        if secret is None:
            raise _unauthenticated(f"this server needs a key: {_HOW}")
        key = self._keyring.find(secret)
        if key is None:
            raise _unauthenticated(f"the key is not one that this server accepts: {_HOW}")
        _caller.set(_Caller(key.name, key.digest, self._keyring, self._counts))


@dataclass(frozen=True)
class _Caller:
    """The key that a request or connection was opened with."""

    name: str
    _digest: bytes
    _keyring: KeyRing
    _counts: SharedCounts = field(compare=False)

    @contextmanager
    def admit(self, items: int) -> Iterator[None]:
        key = self._keyring.current(self._digest)
        if key is None:  # it was removed while the connection is open
            raise _unauthenticated(f"the key is no longer accepted by this server: {_HOW}")
        # Counted before they are looked at: of two gateways at least one sees the items of both.
        self._counts.add(self._items, items)
        try:
            self._refuse_beyond(key.max_in_flight_items, items)
            yield
        finally:
            self._counts.add(self._items, -items)

    @property
    def _items(self) -> str:
        """The name of the number of its items in flight."""
        return f"items of key {self.name}"

    def _refuse_beyond(self, limit: int | None, items: int) -> None:
        if limit is None:
            return
        if items > limit:
            raise RequestError(
                f"{items:,} items in one request; this key may have {limit:,} in flight: send "
                f"fewer in one, with the Python client by a batch_size of {limit} or less",
                "RESOURCE_EXHAUSTED",
            )
        in_flight = self._counts.total(self._items) - items
        if in_flight + items > limit:
            raise RequestError(
                f"{in_flight:,} items of this key are in flight, and it may have {limit:,}; try "
                "again in a moment",
                "RESOURCE_EXHAUSTED",
                retry_after=_RETRY_SECONDS,
            )


_caller: ContextVar[_Caller | None] = ContextVar("caller", default=None)


def caller_name() -> str:
    """The name of the key of the request that the current task serves, for logs and metrics;
    "": the server asks for no key."""
    caller = _caller.get()
    return caller.name if caller else ""


@contextmanager
def admitted(items: int) -> Iterator[None]:
    """Counts items of the current request as in flight.

    Raises:
        RequestError: RESOURCE_EXHAUSTED: its key has too many in flight; UNAUTHENTICATED: its key
            was removed since the connection was opened.
    """
    caller = _caller.get()
    if caller is None:
        yield
        return
    with caller.admit(items):
        yield


class HttpAccess:
    """ASGI middleware: answers requests without a key, whatever their path, with 401.

    max_discarded_bytes: of a body that is read and dropped, so that a client that is still sending
        it gets the answer; with a longer one the connection is closed.
    """

    def __init__(self, app: ASGIApp, access: Access, max_discarded_bytes: int) -> None:
        self._app, self._access = app, access
        self._max_discarded_bytes = max_discarded_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        if not self._access.is_open(scope["path"]):
            try:
                self._access.identify(headers)
            except RequestError as error:
                response = json_error(401, error.code, str(error), error_dialect(scope))
                response.headers.update(CHALLENGE)
                if not self._is_short(headers):
                    response.headers["Connection"] = "close"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_short(self, headers: Headers) -> bool:
        if "transfer-encoding" in headers:
            return False
        return int(headers.get("content-length") or 0) <= self._max_discarded_bytes


class GrpcAccess(grpc.aio.ServerInterceptor):
    """Ends calls without a key, whatever their method, before a message of theirs is read.

    observe: the context in which a call of a method is refused.
    """

    def __init__(
        self, access: Access, observe: Callable[[str, Context], AbstractContextManager[Any]]
    ) -> None:
        self._access, self._observe = access, observe

    async def intercept_service(
        self, continuation: Callable[..., Any], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, or one that refuses it."""
        if not handler_call_details.method.startswith(_OPEN_SERVICE):
            try:
                self._access.identify(_text_headers(handler_call_details.invocation_metadata))
            except RequestError as error:
                return self._refusing(handler_call_details.method, error)
        return await continuation(handler_call_details)

    def _refusing(self, method: str, error: RequestError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_: Any, context: Context) -> None:
            with self._observe(method, context) as observed:
                observed.code = error.code
                await abort(context, error)

        # Of this kind for calls of every kind: one that takes a single message would read it first.
        return grpc.stream_stream_rpc_method_handler(refuse)


def _text_headers(metadata: Any) -> dict[str, str]:
    return {name: value for name, value in metadata or () if isinstance(value, str)}


def _secret(headers: Mapping[str, str]) -> str | None:
    """The key that headers hold, in one of the forms that clients use."""
    value = headers.get("authorization", "").strip()
    scheme, _, rest = value.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic" and _is_same_origin(headers):
        return _password(rest.strip())
    # clip-as-service's clients send what they are given as it is.
    found = [value, *(headers.get(name, "").strip() for name in _PLAIN_HEADERS)]
    return next(filter(None, found), None)


def _password(credentials: str) -> str | None:
    """The password of HTTP's Basic scheme; the user's name is not looked at."""
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return None
    return decoded.partition(":")[2] or None


def _is_same_origin(headers: Mapping[str, str]) -> bool:
    """Whether no page of another site makes the request: browsers add a password that they
    remember to those, too."""
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc == headers.get("host")


def _unauthenticated(message: str) -> RequestError:
    return RequestError(message, "UNAUTHENTICATED")
