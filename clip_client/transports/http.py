"""HTTP: `POST /encode`, `POST /rank` and `GET /info` in protobuf, on kept connections."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import zlib
from contextlib import AbstractAsyncContextManager

import aiohttp
from google.protobuf.message import DecodeError

from clip_client.address import Address
from clip_client.errors import ClientClosedError, server_error
from clip_client.proto import clip_pb2
from clip_client.proxies import environment_proxy
from clip_client.sessions import open_session, reason
from clip_client.tls import Trust
from clip_client.transports.base import (
    CONNECT_SECONDS,
    REQUEST_ID,
    Compression,
    broken,
    status_error,
)
from clip_client.transports.jina_gateway import is_jina_gateway, jina_gateway_error

_PROTOBUF = "application/x-protobuf"
# Of compressed requests: texts shrink hardly more at the slower levels.
_LEVEL = 1
# The most requests in flight, and so connections.
_MAX_IN_FLIGHT = 32


def open_transport(
    address: Address,
    headers: dict[str, str],
    trust: Trust,
    compression: Compression | None = None,
) -> HttpTransport:
    """The transport for `http://` and `https://`."""
    return HttpTransport(address, headers, trust, compression)


class HttpTransport:
    """One HTTP request for each request."""

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

    async def send(self, request: clip_pb2.Request) -> clip_pb2.Response:
        kind = request.WhichOneof("body")
        assert kind is not None
        try:
            async with self._free:
                if self._http.closed:
                    raise ClientClosedError
                async with await self._ask(kind, request) as reply:
                    content = await reply.read()
                    if reply.status == 404 and await is_jina_gateway(
                        self._address, self._trust, self._proxy
                    ):
                        raise jina_gateway_error(self._address)
                    return self._read(kind, reply, content)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise self._address.unreachable(reason(error), self._proxy) from None
        except aiohttp.ClientError as error:
            detail = f"the connection broke: {reason(error)}"
            raise broken(self._address.unreachable(detail, self._proxy)) from None

    async def close(self) -> None:
        await self._http.close()

    async def _ask(
        self, kind: str, request: clip_pb2.Request
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        url = f"{self._address}/{kind}"
        if kind == "info":
            model = {"model": request.info.model} if request.info.model else None
            return self._http.get(url, params=model, proxy=self._proxy, allow_redirects=False)
        content, headers = getattr(request, kind).SerializeToString(), {}
        if self._compression:
            content = await asyncio.to_thread(_deflated, content, self._compression)
            headers["content-encoding"] = self._compression
        return self._http.post(
            url,
            data=io.BytesIO(content),  # not the bytes themselves: aiohttp warns of large ones
            headers=headers,
            proxy=self._proxy,
            allow_redirects=False,
        )

    def _read(self, kind: str, reply: aiohttp.ClientResponse, content: bytes) -> clip_pb2.Response:
        succeeded = 200 <= reply.status < 300
        request_id = reply.headers.get(REQUEST_ID, "")
        response = clip_pb2.Response(request_id=request_id)
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
            raise server_error(str(error["code"]), str(error["message"]), request_id)
        except (ValueError, KeyError, TypeError):
            raise status_error(str(reply.url), reply.status, content, self._proxy) from None


def _deflated(content: bytes, compression: Compression) -> bytes:
    """A body in the format of a `content-encoding`."""
    if compression == "gzip":
        return gzip.compress(content, _LEVEL)
    return zlib.compress(content, _LEVEL)
