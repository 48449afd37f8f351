"""The gateway's process: finds the executors, opens the ports, drains and closes them."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
from jina.serve.runtimes.gateway.gateway import BaseGateway
from jina.serve.runtimes.servers import BaseServer

from clip_client.proto import clip_pb2 as pb
from clip_server import logs
from clip_server.errors import ConfigurationError, RequestError
from clip_server.gateway.access import Access, admitted
from clip_server.gateway.admission import Backlog
from clip_server.gateway.collection import open_collection
from clip_server.gateway.connections import ConnectionBounds, Connections
from clip_server.gateway.documents import FlowDoc
from clip_server.gateway.grpc import GrpcListener
from clip_server.gateway.http import PATHS, HttpListener
from clip_server.gateway.jina_protocol import JinaRequestHandler
from clip_server.gateway.lifecycle import Lifecycle
from clip_server.gateway.listener import Listener, ListenerOptions
from clip_server.gateway.metrics import GatewayMetrics
from clip_server.gateway.observation import Observer
from clip_server.gateway.replicas import SILENCE_SECONDS, replica_pools
from clip_server.gateway.router import Router
from clip_server.gateway.tls import Tls, TlsFiles
from clip_server.gateway.topology import FlowExecutor, Topology
from clip_server.gateway.websocket import WebSocketListener
from clip_server.keys.keyring import open_keyring
from clip_server.launch import gateway_group, heartbeats, jina_internals
from clip_server.launch.process_setup import (
    die_with_parent,
    raise_descriptor_limit,
    return_large_blocks,
    return_memory_regularly,
    spare_garbage_collector,
)
from clip_server.rpc.errors import error_response
from clip_server.rpc.items import count_items

# For connections to be closed when the grace period is over.
_LEAST_CLOSING_SECONDS = 0.1

LISTENERS: dict[str, type[Listener]] = {
    "grpc": GrpcListener,
    "http": HttpListener,
    "websocket": WebSocketListener,
}


class ClipGateway(BaseServer, BaseGateway):
    """Serves clip.v1 on every protocol and port that the flow names.

    max_request_bytes: of one message or HTTP body.
    max_queued_bytes: of requests in flight, and of those being received; beyond it, more are
        refused.
    auth_file: of the keys that callers need, in place of CLIP_AUTH_FILE.
    public_metrics: whether `/metrics` needs no key.
    page: whether browsers get a page at `/` of the HTTP port.
    ssl_ca_certs: the authorities of clients, which then need a certificate.
    max_wait: seconds; a request that would wait longer for its turn is refused. 0: never.
    grace_seconds: requests in flight have so long to finish when the server is told to end.
    silence_seconds: see ReplicaPool.
    number: of this gateway, where several share the ports.
    arguments: the keys of ConnectionBounds, and those of Jina.
    """

    def __init__(
        self,
        max_request_bytes: int = 128 << 20,
        max_queued_bytes: int = 1 << 30,
        auth_file: str | None = None,
        public_metrics: bool = False,
        page: bool = True,
        ssl_ca_certs: str | None = None,
        max_wait: float = 1.0,
        grace_seconds: float = 8.0,
        silence_seconds: float = SILENCE_SECONDS,
        number: int = 0,
        **arguments: Any,
    ) -> None:
        names = [each.name for each in fields(ConnectionBounds)]
        given = {each: arguments.pop(each) for each in names if each in arguments}
        bounds = ConnectionBounds(**given)
        super().__init__(**arguments)
        logs.configure()
        die_with_parent()
        raise_descriptor_limit()
        return_large_blocks()
        return_memory_regularly()
        args = self.runtime_args
        timeout = args.timeout_send if (args.timeout_send or -1) > 0 else None
        timed = jina_internals.gateway_timer(self)
        deployments = json.loads(args.deployments_addresses)
        self._group, self._number = gateway_group.formed(len(deployments)), number
        self._counts = self._group.counts(number)
        self._pools = replica_pools(deployments, timeout, timed, silence_seconds, self._counts)
        self._max_queued_bytes, self._max_wait = max_queued_bytes, max_wait
        self._grace_seconds = grace_seconds
        self._options = ListenerOptions(
            max_request_bytes,
            bool(args.cors),
            args.grpc_server_options or {},
            grpc.Compression[args.compression or "NoCompression"],
            _tls(args, ssl_ca_certs),
            Access(open_keyring(auth_file), public_metrics, self._counts),
            Connections(bounds, self._counts, max_queued_bytes),
            page,
            self._group.size,
        )
        self._opened: list[Listener] = []
        self._background: list[asyncio.Task[None]] = []
        self._closed = asyncio.Event()

    async def setup_server(self) -> None:
        """Opens the ports once the executors answer."""
        self._background.append(asyncio.create_task(_beat(heartbeats.gateway_slot(self._number))))
        topology = await self._discover()
        if topology is None:
            return
        metrics = GatewayMetrics(self._group, self._number)
        self._siblings = metrics.siblings
        await self._siblings.serve()
        observer = Observer(metrics, {*PATHS, *topology.endpoints()}, self.tracer)
        self._lifecycle = Lifecycle(topology.can_answer, self._group.last_request(self._number))
        jina = JinaRequestHandler(
            self._request_handler,
            topology,
            observer,
            self._lifecycle,
            self.runtime_args.prefetch,
        )
        collection = await open_collection(topology)
        router = Router(topology, jina, collection, self._max_queued_bytes, self._counts)

        async def call(request: pb.Request) -> pb.Response:
            items = (count_items(request) or 0) + len(request.rank.candidates)
            request_id = request.id
            try:
                with admitted(items):
                    answer = router.call(request)
                    del request  # see `ReplicaPool.send`
                    response = await answer
            except RequestError as error:
                return error_response(request_id, error)
            if response.HasField("info"):
                response.info.max_request_bytes = self._options.max_request_bytes
            return response

        for protocol, port in zip(self.protocols, self.ports, strict=True):
            listener = LISTENERS[str(protocol).lower()](
                self.host,
                port,
                call,
                router,
                jina,
                observer,
                self._lifecycle,
                self._options,
            )
            await listener.start()
            metrics.add_protocol(str(protocol).lower(), listener.count_connections)
            self._opened.append(listener)
        watches = [router.watch(), *(pool.watch() for pool in self._pools)]
        self._background += [asyncio.create_task(watch) for watch in watches]
        spare_garbage_collector()

    async def _discover(self) -> Topology | None:
        """The executors, once all of them answer; None: the start is cancelled."""
        infos = await asyncio.gather(*(pool.find_info(self.is_cancel) for pool in self._pools))
        if self.is_cancel.is_set():
            return None
        endpoints = await jina_internals.learn_endpoints(self, FlowDoc)
        executors = [
            FlowExecutor(
                pool,
                endpoints[pool.name],
                info if info and info.dim else None,
                bool(info and info.HasField("collection")),
                Backlog(pool, self._max_wait, self._group.work(self._number, index)),
            )
            for index, (pool, info) in enumerate(zip(self._pools, infos, strict=True))
            if pool.name in endpoints
        ]
        return Topology(executors, json.loads(self.runtime_args.graph_conditions))

    async def run_server(self) -> None:
        """Serves until told to end."""
        await self._closed.wait()

    async def shutdown(self) -> None:
        """Lets requests in flight finish, and closes everything. Jina calls it twice."""
        if self._closed.is_set():
            return
        opened, self._opened = self._opened, []
        end = time.monotonic() + self._grace_seconds
        if opened:
            await self._lifecycle.drain(self._grace_seconds)
            await self._siblings.close()
        seconds = max(_LEAST_CLOSING_SECONDS, end - time.monotonic())
        await asyncio.gather(*(listener.stop(seconds) for listener in opened))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*(pool.close() for pool in self._pools))
        await self._request_handler.close()
        await super().shutdown()
        self._closed.set()


async def _beat(slot: int) -> None:
    """Shows that the event loop turns, until cancelled."""
    while True:
        heartbeats.beat(slot)
        await asyncio.sleep(heartbeats.INTERVAL_SECONDS)


def _tls(args: Any, client_ca: str | None) -> Tls | None:
    key, certificate = args.ssl_keyfile, args.ssl_certfile
    if not key and not certificate:
        return None
    if not (key and certificate):
        raise ConfigurationError("TLS needs both ssl_keyfile and ssl_certfile under gateway:")
    password = (args.uvicorn_kwargs or {}).get("ssl_keyfile_password")
    return Tls(
        TlsFiles(
            Path(key),
            Path(certificate),
            password and str(password),
            Path(client_ca) if client_ca else None,
        )
    )
