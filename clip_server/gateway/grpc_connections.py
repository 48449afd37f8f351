"""The connections of gRPC servers, which the library accepts by itself: their number, a bound for
those of one address, and the time that a message may take."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from clip_server.errors import RequestError
from clip_server.gateway.connections import ConnectionBounds, too_many_of_address
from clip_server.gateway.observation import join_host_port
from clip_server.launch.gateway_group import SharedCounts
from clip_server.rpc.grpc_service import Context, abort

# The most sockets of one server that gRPC lists in one answer.
_MOST_SOCKETS = 1 << 20
# Between two looks at which connections are still open, where one is to be admitted or another
# gateway counts them: listing thousands takes milliseconds.
_LOOK_SECONDS, _WATCH_SECONDS = 0.25, 1.0

# The context in which a call of a method is refused.
ObserveRefused: TypeAlias = Callable[[str, Context], AbstractContextManager[Any]]


def count_connections() -> int:
    """Open connections of this process's gRPC servers."""
    return len(_open_sockets())


def client_of(context: Context) -> str:
    """The address and port of the client of a call."""
    return unquote(context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")


class ConnectionsOfAddresses(grpc.aio.ServerInterceptor):
    """Refuses the calls of connections beyond the most that one address may have.

    A connection counts from its first call until it is closed. Those without a call are bounded by
    gRPC, together with the others of all addresses.

    counts: those that other gateways have are added to.
    """

    def __init__(
        self, bounds: ConnectionBounds, counts: SharedCounts, observe: ObserveRefused
    ) -> None:
        self._most, self._most_in_all = bounds.max_connections_per_address, bounds.max_connections
        self._counts, self._observe = counts, observe
        self._admitted: set[str] = set()
        self._clients: dict[int, str] = {}
        self._looked = 0.0

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, which refuses it if its connection is one too many."""
        handler = await continuation(handler_call_details)
        # Those of health and reflection read messages by themselves, and are always answered.
        if handler is None or handler.request_deserializer is not None:
            return handler
        answer = handler.stream_stream or handler.unary_unary

        async def answer_admitted(messages: Any, context: Context) -> Any:
            if not self._is_admitted(client_of(context)):
                error = too_many_of_address(self._most)
                with self._observe(handler_call_details.method, context) as observed:
                    observed.code = error.code
                    await abort(context, error)
            return await answer(messages, context)

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(answer_admitted)
        return grpc.unary_unary_rpc_method_handler(answer_admitted)

    def _is_admitted(self, client: str) -> bool:
        if client in self._admitted:
            return True
        of_address = _of_address(client)
        is_full = self._counts.total(of_address) >= self._most
        if is_full or len(self._admitted) >= self._most_in_all:  # then some of them are closed
            self._forget_closed()
        if self._counts.total(of_address) >= self._most:
            return False
        self._admitted.add(client)
        self._counts.add(of_address, 1)
        return True

    async def watch(self) -> None:
        """Forgets closed connections in time for other gateways, until cancelled."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._admitted:
                self._forget_closed()

    def _forget_closed(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        known = self._clients
        self._clients = {each: known.get(each) or _client(each) for each in _open_sockets()}
        closed = self._admitted - set(self._clients.values())
        self._admitted -= closed
        for each in closed:
            self._counts.add(_of_address(each), -1)


def _of_address(client: str) -> str:
    """The name of the count of connections like that of a client."""
    return f"gRPC connections of {client.rpartition(':')[0]}"


class MessagesInTime(grpc.aio.ServerInterceptor):
    """Ends unary calls whose message does not come in time.

    gRPC hands a message over once it is complete: how fast it comes is not to be seen.

    seconds: from the start of a call until its message has come.
    """

    def __init__(self, seconds: float, observe: ObserveRefused) -> None:
        self._seconds, self._observe = seconds, observe

    async def intercept_service(
        self, continuation: Callable[..., Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Returns the handler of a call, which reads its message by itself if there is one only."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer or not handler.unary_unary:
            return handler
        answer = handler.unary_unary

        async def answer_in_time(_: Any, context: Context) -> Any:
            try:
                message = await self._read(context)
            except RequestError as error:
                with self._observe(handler_call_details.method, context) as observed:
                    observed.code = error.code
                    await abort(context, error)
            return await answer(message, context)

        return grpc.stream_unary_rpc_method_handler(answer_in_time)

    async def _read(self, context: Context) -> Any:
        try:
            message = await asyncio.wait_for(context.read(), self._seconds)
        except asyncio.TimeoutError:
            raise RequestError(
                f"the message did not come within {self._seconds:g} s (body_timeout)",
                "DEADLINE_EXCEEDED",
            ) from None
        if message is grpc.aio.EOF:
            raise RequestError("the call has no message")
        return message


def _open_sockets() -> list[int]:
    """The numbers of open connections, as gRPC's channelz lists them."""
    servers = json.loads(cygrpc.channelz_get_servers(0)).get("server", ())
    found = []
    for server in servers:
        number = int(server["ref"]["serverId"])
        listed = json.loads(cygrpc.channelz_get_server_sockets(number, 0, _MOST_SOCKETS))
        found += [int(each["socketId"]) for each in listed.get("socketRef", ())]
    return found


def _client(socket: int) -> str:
    """The address and port at the other end of a connection; empty if it is closed by now."""
    try:
        remote = json.loads(cygrpc.channelz_get_socket(socket))["socket"]["remote"]
        address = ipaddress.ip_address(base64.b64decode(remote["tcpip_address"]["ip_address"]))
        return join_host_port((str(address), remote["tcpip_address"]["port"]))
    except (KeyError, ValueError):
        return ""
