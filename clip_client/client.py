"""The Client: texts and pictures in, vectors out."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from clip_client import calls
from clip_client.address import Address
from clip_client.connection import Connection
from clip_client.errors import InvalidInputError
from clip_client.flow import Flow, arun, run

P = ParamSpec("P")
T = TypeVar("T")


def _sync(
    call: Callable[Concatenate[Connection, P], Flow[T]],
) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(call)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if args and hasattr(args[0], "__aiter__"):
            raise TypeError(f"an async generator needs the async call: a{call.__name__}")
        return run(call(client._connection, *args, **kwargs))

    return _signed(method, call, call.__name__)


def _async(
    call: Callable[Concatenate[Connection, P], Flow[T]],
) -> Callable[Concatenate[Client, P], Coroutine[Any, Any, T]]:
    @functools.wraps(call)
    async def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await arun(call(client._connection, *args, **kwargs))

    return _signed(method, call, f"a{call.__name__}")


M = TypeVar("M", bound=Callable[..., Any])


def _signed(method: M, call: Callable[..., Any], name: str) -> M:
    """The method with the call's signature, as `help` shows it: of a Client, without `Flow`."""
    signature = inspect.signature(call)
    _, *parameters = signature.parameters.values()
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    result = str(signature.return_annotation).removeprefix("Flow[").removesuffix("]")
    signed = signature.replace(parameters=[this, *parameters], return_annotation=result)
    method.__name__, method.__qualname__ = name, f"Client.{name}"
    method.__module__ = __name__
    method.__signature__ = signed  # type: ignore[attr-defined]
    return method


class Client:
    """A client of one server, for any number of threads and event loops at once.

    server: `scheme://host:port`, the scheme one of grpc, http, ws, or grpcs, https, wss for TLS.
    credential: what the server asks for, sent as `authorization: Bearer <credential>`.

    It connects at the first call, keeps the connection, and reconnects when that broke. Close
    it, or use it in `with` or `async with`. Raises InvalidInputError for another address.

    Every call has an async twin, named with an `a` before it, that takes the same arguments. A
    forked child may use its parent's http and ws Clients, on connections of its own; gRPC works
    in processes that were spawned, and in forked ones whose parent has not used it.
    """

    def __init__(self, server: str, credential: str | Mapping[str, str] | None = None) -> None:
        self._connection = Connection(Address.parse(server), _headers(credential))

    encode = _sync(calls.encode)
    aencode = _async(calls.encode)
    rank = _sync(calls.rank)
    arank = _async(calls.rank)
    classify = _sync(calls.classify)
    aclassify = _async(calls.classify)
    profile = _sync(calls.profile)
    aprofile = _async(calls.profile)
    info = _sync(calls.info)
    ainfo = _async(calls.info)

    def close(self) -> None:
        """Closes the connection. Requests still under way in other threads fail."""
        closing = self._connection.close()
        if closing is not None:
            closing.result()

    async def aclose(self) -> None:
        """Closes the connection, as `close` does."""
        closing = self._connection.close()
        if closing is not None:
            await asyncio.wrap_future(closing)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Client({str(self._connection.address)!r})"


def _headers(credential: str | Mapping[str, str] | None) -> dict[str, str]:
    if isinstance(credential, Mapping):
        # As clip-as-service has it: {'Authorization': token}.
        named = {name.lower(): value for name, value in credential.items()}
        if list(named) != ["authorization"]:
            raise InvalidInputError("a credential is a str, or {'Authorization': ...}")
        credential = named["authorization"].removeprefix("Bearer ")
    if credential is None:
        return {}
    if not credential or not credential.isascii() or not credential.isprintable():
        raise InvalidInputError("a credential is of printable ASCII characters")
    return {"authorization": f"Bearer {credential}"}
