"""The gateway's process: finds the executors, opens the ports, drains and closes them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from jina.serve.runtimes.gateway.gateway import BaseGateway
from jina.serve.runtimes.servers import BaseServer

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError
from clip_server.gateway.grpc import GrpcListener
from clip_server.gateway.http import HttpListener
from clip_server.gateway.jina_protocol import JinaRequestHandler
from clip_server.gateway.listener import Listener, ListenerOptions, Tls
from clip_server.gateway.router import Router, replica_pools
from clip_server.gateway.websocket import WebSocketListener
from clip_server.launch.process_setup import follow_parent

LISTENERS: dict[str, type[Listener]] = {
    "grpc": GrpcListener,
    "http": HttpListener,
    "websocket": WebSocketListener,
}


class ClipGateway(BaseServer, BaseGateway):
    """Serves clip.v1 on every protocol and port that the flow names.

    max_request_bytes: of one message or HTTP body.
    max_queued_bytes: of requests in flight; beyond it, more are refused.
    """

    def __init__(
        self,
        max_request_bytes: int = 128 << 20,
        max_queued_bytes: int = 1 << 30,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        follow_parent()
        args = self.runtime_args
        timeout = args.timeout_send if (args.timeout_send or -1) > 0 else None
        pools = replica_pools(json.loads(args.deployments_addresses), timeout)
        self.router = Router(pools, max_queued_bytes)
        self._max_request_bytes = max_request_bytes
        jina = JinaRequestHandler(self._request_handler, args.prefetch)
        options = ListenerOptions(
            max_request_bytes, bool(args.cors), args.grpc_server_options or {}, _tls(args)
        )
        self.listeners = [
            LISTENERS[str(protocol).lower()](
                self.host, port, self._call, self.router, jina, options
            )
            for protocol, port in zip(self.protocols, self.ports, strict=True)
        ]
        self._opened: list[Listener] = []
        self._closed = asyncio.Event()

    async def _call(self, request: pb.Request) -> pb.Response:
        response = await self.router.call(request)
        if response.HasField("info"):
            response.info.max_request_bytes = self._max_request_bytes
        return response

    async def setup_server(self) -> None:
        """Opens the ports once the executors answer."""
        await self.router.discover(self.is_cancel)
        if self.is_cancel.is_set():
            return
        # A Jina client learns the endpoints from here.
        await self.streamer._get_endpoints_input_output_models(is_cancel=self.is_cancel)
        for listener in self.listeners:
            await listener.start()
            self._opened.append(listener)

    async def run_server(self) -> None:
        """Serves until told to end."""
        await self._closed.wait()

    async def shutdown(self) -> None:
        """Lets requests in flight finish, and closes everything. Jina calls it twice."""
        if self._closed.is_set():
            return
        opened, self._opened = self._opened, []
        await asyncio.gather(*(listener.stop() for listener in opened))
        await self.router.close()
        await self._request_handler.close()
        await super().shutdown()
        self._closed.set()


def _tls(args: Any) -> Tls | None:
    key, certificate = args.ssl_keyfile, args.ssl_certfile
    if not key and not certificate:
        return None
    if not (key and certificate):
        raise ConfigurationError("TLS needs both ssl_keyfile and ssl_certfile under gateway:")
    return Tls(Path(key), Path(certificate))
