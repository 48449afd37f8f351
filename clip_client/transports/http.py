"""HTTP: `POST /encode`, `POST /rank` and `GET /info` in protobuf, on kept connections.

A request over HTTP costs several times what one on a stream does, mostly in the libraries of both
sides. So requests of one text that are ready at the same moment go together, to `POST /`.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zlib
from collections.abc import Sequence

import aiohttp
from google.protobuf.message import DecodeError

from clip_client.address import Address
from clip_client.envelope import serialize_messages
from clip_client.errors import ClientClosedError, ClipError, server_error
from clip_client.proto import clip_pb2
from clip_client.proxies import environment_proxy
from clip_client.sessions import open_session, reason
from clip_client.tls import Trust
from clip_client.transports.base import (
    CONNECT_SECONDS,
    REQUEST_ID,
    Compression,
    broken,
    refusal,
    status_error,
)
from clip_client.transports.jina_gateway import is_jina_gateway, jina_gateway_error
from clip_client.transports.sharing import Sharing

_PROTOBUF = "application/x-protobuf"
# Of compressed requests: texts shrink hardly more at the slower levels.
_LEVEL = 1
# The most HTTP requests in flight, and so connections.
_MAX_IN_FLIGHT = 32
# Requests up to this size may share an HTTP request.
_SMALL_BYTES = 4 << 10
# The statuses of shared requests that each of them would get by itself, too. Any other comes from a
# server or proxy that does not know of sharing.
_OF_EACH = (401, 429, 502, 503, 504)
# Larger bodies are handed over as files.
_LARGE_BYTES = 1 << 20


def open_transport(
    address: Address,
    headers: dict[str, str],
    trust: Trust,
    compression: Compression | None = None,
) -> HttpTransport:
    """The transport for `http://` and `https://`."""
    return HttpTransport(address, headers, trust, compression)


class _CannotShareError(ClipError):
    """The server, or a proxy before it, takes no several requests in one."""


class HttpTransport:
    """One HTTP request for each request, or for several small ones."""

    def __init__(
        self,
        address: Address,
        headers: dict[str, str],
        trust: Trust,
        compression: Compression | None,
    ) -> None:
        self._address = address
        self._compression = compression
        self._trust = trust
        self._proxy = environment_proxy(str(address))
        self._http = open_session(
            # The whole exchange has its own deadline, above the transports.
            aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS),
            # Without TLS a wrong SSL_CERT_FILE is none of this connection's business.
            trust if address.secure or self._proxy else Trust(verify=False),
            {**headers, "accept": _PROTOBUF, "content-type": _PROTOBUF},
        )
        self._free = asyncio.Semaphore(_MAX_IN_FLIGHT)
        self._sharing: Sharing | None = Sharing(self._send_together)

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        if self._sharing and _is_small(request):
            try:
                return await self._sharing.send(request)
            except _CannotShareError:
                self._sharing = None
        return await self._send_alone(request)

    async def close(self) -> None:
        await self._http.close()

    async def _send_alone(self, request: clip_pb2.Request) -> clip_pb2.Response:
        kind = request.WhichOneof("body")
        assert kind is not None
        if kind == "info":
            reply, content = await self._exchange("GET", kind, model=request.info.model)
        else:
            body = getattr(request, kind).SerializeToString()
            reply, content = await self._exchange("POST", kind, body)
        if reply.status == 404 and await is_jina_gateway(self._address, self._trust, self._proxy):
            raise jina_gateway_error(self._address)
        return self._read(kind, reply, content)

    async def _send_together(
        self, requests: Sequence[clip_pb2.Request]
    ) -> Sequence[clip_pb2.Response]:
        if len(requests) == 1:
            return [await self._send_alone(requests[0])]
        for number, request in enumerate(requests, 1):
            request.id = number
        reply, content = await self._exchange("POST", "", serialize_messages(iter(requests)))
        if reply.status in _OF_EACH:
            return [self._read("", reply, content)] * len(requests)
        if reply.status != 200:
            raise _CannotShareError
        try:
            responses = clip_pb2.Responses.FromString(content).responses
            found = {response.id: response for response in responses}
            return [found[request.id] for request in requests]
        except (DecodeError, KeyError):
            raise _CannotShareError from None

    async def _exchange(
        self, method: str, path: str, body: bytes | None = None, model: str = ""
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        """Makes one HTTP request. Returns the response and its body."""
        headers = {}
        if self._compression and body:
            body = await asyncio.to_thread(_deflated, body, self._compression)
            headers["content-encoding"] = self._compression
        try:
            async with self._free:
                if self._http.closed:
                    raise ClientClosedError
                async with self._http.request(
                    method,
                    f"{self._address}/{path}",
                    params={"model": model} if model else None,
                    # Not large bytes themselves, of which aiohttp warns.
                    data=io.BytesIO(body) if body and len(body) > _LARGE_BYTES else body,
                    headers=headers,
                    proxy=self._proxy,
                    allow_redirects=False,
                ) as reply:
                    return reply, await reply.read()
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self._address.unreachable(reason(error), self._proxy) from None
        except aiohttp.ClientError as error:
            detail = f"the connection broke: {reason(error)}"
            raise broken(self._address.unreachable(detail, self._proxy)) from None

    def _read(self, kind: str, reply: aiohttp.ClientResponse, content: bytes) -> clip_pb2.Response:
        succeeded = 200 <= reply.status < 300
        response = clip_pb2.Response(request_id=reply.headers.get(REQUEST_ID, ""))
        try:
            if reply.content_type == _PROTOBUF:
                body = getattr(response, kind if succeeded else "error")
                body.SetInParent()
                body.MergeFromString(content)
                return response
        except DecodeError:
            pass
        if succeeded:
            raise server_error("UNKNOWN", f"{reply.url} answered, but not with a clip.v1 message")
        try:
            error = json.loads(content)["error"]
            raise refusal(str(error["code"]), str(error["message"]), reply.headers)
        except (ValueError, KeyError, TypeError):
            raise status_error(
                str(reply.url), reply.status, content, reply.headers, self._proxy
            ) from None


def _is_small(request: clip_pb2.Request) -> bool:
    """Whether a request may share an exchange: it has one text, which others do not wait for."""
    items = request.encode.items
    return len(items) == 1 and items[0].HasField("text") and request.ByteSize() <= _SMALL_BYTES


def _deflated(content: bytes, compression: Compression) -> bytes:
    """A body in the format of a `content-encoding`."""
    if compression == "gzip":
        return gzip.compress(content, _LEVEL)
    return zlib.compress(content, _LEVEL)
