"""HTTP: `POST /encode`, `POST /rank` and `GET /info` in protobuf, on kept connections."""

from __future__ import annotations

import asyncio
import json
import ssl

import httpx
from google.protobuf.message import DecodeError

from clip_client.address import Address
from clip_client.errors import ConnectionFailedError, server_error
from clip_client.proto import clip_pb2
from clip_client.transports.base import CONNECT_SECONDS, ConnectionLostError, status_error

_PROTOBUF = "application/x-protobuf"
# Requests, and so connections, at once: httpx's pool gets slow with the number of them.
_AT_ONCE = 32


def open_transport(address: Address, headers: dict[str, str]) -> HttpTransport:
    """The transport for `http://` and `https://`."""
    return HttpTransport(address, headers)


class HttpTransport:
    """One HTTP request for each request."""

    def __init__(self, address: Address, headers: dict[str, str]) -> None:
        self._address = address
        self._http = httpx.AsyncClient(
            base_url=str(address),
            headers={**headers, "accept": _PROTOBUF},
            verify=ssl.create_default_context() if address.secure else False,
            # The whole exchange has its own deadline, above the transports.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        if self._http.is_closed:
            raise ConnectionFailedError("the client was closed")
        kind = request.WhichOneof("body")
        assert kind is not None
        try:
            async with self._free:
                reply = await self._http.send(self._build(kind, request))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise self._address.unreachable(_root(error)) from None
        except httpx.TransportError as error:
            reason = f"the connection broke: {error or type(error).__name__}"
            raise ConnectionLostError(str(self._address.unreachable(reason))) from None
        return self._read(kind, reply)

    async def close(self) -> None:
        await self._http.aclose()

    def _build(self, kind: str, request: clip_pb2.Request) -> httpx.Request:
        if kind == "info":
            return self._http.build_request("GET", "/info")
        content = getattr(request, kind).SerializeToString()
        headers = {"content-type": _PROTOBUF}
        return self._http.build_request("POST", f"/{kind}", content=content, headers=headers)

    def _read(self, kind: str, reply: httpx.Response) -> clip_pb2.Response:
        response = clip_pb2.Response()
        try:
            if self._is_protobuf(reply):
                body = getattr(response, kind if reply.is_success else "error")
                body.SetInParent()
                body.MergeFromString(reply.content)
                return response
        except DecodeError:
            pass
        if reply.is_success:
            raise server_error("UNKNOWN", f"{reply.url} answered, but not with a clip.v1 message")
        try:
            error = json.loads(reply.content)["error"]
            raise server_error(str(error["code"]), str(error["message"]))
        except (ValueError, KeyError, TypeError):
            raise status_error(str(reply.url), reply.status_code, reply.content) from None

    @staticmethod
    def _is_protobuf(reply: httpx.Response) -> bool:
        content_type: str = reply.headers.get("content-type", "")
        return content_type.partition(";")[0].strip() == _PROTOBUF


def _root(error: BaseException) -> BaseException:
    """What httpx's "All connection attempts failed" was made of."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error
