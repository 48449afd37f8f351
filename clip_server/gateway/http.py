"""The HTTP port: its routes, and pages about the server itself."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping, MutableSequence, Sequence
from functools import cached_property, partial
from importlib import resources
from typing import Any

import uvicorn
from google.protobuf.message import Message
from jina.proto import jina_pb2
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router, request_response
from starlette.types import ASGIApp, Receive, Scope, Send

import clip_client.proto
from clip_client.proto import clip_pb2 as pb
from clip_server.gateway import openapi
from clip_server.gateway.access import HttpAccess
from clip_server.gateway.apis import tei
from clip_server.gateway.apis.clip import ClipApi
from clip_server.gateway.apis.cohere import CohereApi
from clip_server.gateway.apis.dialect import Dialect
from clip_server.gateway.apis.immich import ImmichApi
from clip_server.gateway.apis.openai import OpenAIApi
from clip_server.gateway.apis.tei import TeiApi
from clip_server.gateway.apis.weaviate import WeaviateApi
from clip_server.gateway.compressing_app import CompressingApp
from clip_server.gateway.connections import BoundedHttpProtocol
from clip_server.gateway.early_refusal import EarlyRefusal
from clip_server.gateway.http_messages import (
    PROTOBUF,
    answer_errors_in,
    ask,
    error_dialect,
    error_handlers,
    json_error,
    json_response,
    own_error,
    protobuf_response,
    refuse,
)
from clip_server.gateway.lifecycle import Lifecycle
from clip_server.gateway.listener import Listener
from clip_server.gateway.metrics import CONTENT_TYPE
from clip_server.gateway.observed_app import ObservedApp
from clip_server.gateway.page import PageForBrowsers, reference

# The APIs of other servers.
_DIALECTS: tuple[type[Dialect], ...] = (OpenAIApi, CohereApi, TeiApi, WeaviateApi, ImmichApi)
# Answered while the gateway is draining, too, and not counted.
_PROBES = ("/livez", "/readyz", "/metrics")
_ENDPOINTS = {
    "POST /v1/embeddings": '{"model": "...", "input": ["a cat"]}',
    "POST /encode": '{"data": [{"text": "a cat"}, {"uri": "data:image/png;base64,..."}]}',
    "POST /rank": '{"data": [{"uri": "data:...", "matches": [{"text": "a cat"}]}]}',
    "POST /index": '{"data": [{"id": "1", "text": "a cat", "tags": {"colour": "red"}}]}',
    "POST /search": '{"data": [{"text": "a cat"}], "parameters": {"limit": 10}}',
    "POST /delete": '{"ids": ["1"]}',
    "POST /count": '{"parameters": {"target": "images"}}',
    "GET /openapi.json": "all endpoints, as an OpenAPI 3.1 document",
    "GET /info": "the model and the limits",
    "GET /metrics": "Prometheus metrics",
    "GET /livez": "whether the process runs",
    "GET /readyz": "whether it answers requests",
}

PATHS = {"/docs", "/dry_run", "/post", *(endpoint.split()[1] for endpoint in _ENDPOINTS)}


class HttpListener(Listener):
    """Serves HTTP."""

    async def start(self) -> None:
        """Opens the port."""
        app = _DialectErrors(_DrainingApp(self._app(), self.lifecycle), self._dialects)
        config = uvicorn.Config(
            ObservedApp(app, self.observer),
            self.hosts,
            self.port,
            http=partial(BoundedHttpProtocol, self.options.connections, self.observer),  # type: ignore[arg-type]
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            server_header=False,
        )
        config.load()
        if self.options.tls:
            config.ssl = self.options.tls.context()
        options = self.options
        self._server = _Server(config, options.handshake_seconds, options.shares_ports)
        # The gateway's process has handlers of its own.
        self._server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.01)
        if self._serving.done():
            await self._serving  # raises why it could not start

    async def stop(self, seconds: float) -> None:
        # Read at the end only; any number of seconds will do.
        self._server.config.timeout_graceful_shutdown = seconds  # type: ignore[assignment]
        self._server.should_exit = True
        await self._serving

    def count_connections(self) -> int:
        """The connections that are open."""
        return len(self._server.server_state.connections)

    @cached_property
    def _dialects(self) -> Sequence[Dialect]:
        return [each(self) for each in _DIALECTS]

    def _app(self) -> Starlette:
        clip = ClipApi(self)

        async def answer_other(request: Request) -> Response:
            """Any other path is an endpoint of the flow, as in Jina."""
            if request.method != "POST" or self._is_unknown_to_its_api(request.scope):
                raise HTTPException(404)
            return await clip.answer(request)

        pages = [
            Route("/", self._about),
            Route("/info", self._info),
            Route("/metrics", self._metrics),
            Route("/livez", self._live),
            Route("/readyz", self._ready),
            Route("/dry_run", self._dry_run),
            Route("/clip.proto", self._proto),
            Route("/openapi.json", self._openapi),
            *([Route("/docs", self._reference)] if self.options.page else []),
            # As TEI, infinity and vLLM have it, and as Weaviate asks its vectorizer.
            Route("/health", self._ready),
            Route("/.well-known/live", self._empty),
            Route("/.well-known/ready", self._empty_if_ready),
        ]
        dialects = [route for each in self._dialects for route in each.routes()]
        cors = Middleware(
            CORSMiddleware,
            allow_origins=["*"],
            allow_credentials=True,
            allow_methods=["*"],
            allow_headers=["*"],
        )
        access = Middleware(
            HttpAccess,
            access=self.options.access,
            max_discarded_bytes=self.options.max_request_bytes,
        )
        refusing = Middleware(EarlyRefusal)
        page = [Middleware(PageForBrowsers)] if self.options.page else []
        app = Starlette(
            # CORS before keys: browsers send none with their preflight requests.
            middleware=[
                *([Middleware(CompressingApp)] if self.options.compresses else []),
                *([cors] if self.options.cors else []),
                *page,
                access,
                refusing,
            ],
            exception_handlers=error_handlers(_ENDPOINTS),
        )
        routes = [*clip.routes(), *dialects, *pages]
        app.router = _TableRouter(routes, default=request_response(answer_other))
        return app

    def _is_unknown_to_its_api(self, scope: Scope) -> bool:
        """Whether a path without a route begins as those of another server's API, such as
        `/v1/rerank`, and only the encoder would answer it, which answers any endpoint."""
        path = scope["path"]
        if error_dialect(scope) is own_error or self.router.binds(path):
            return False
        return self.router.route(path).is_direct

    async def _about(self, _: Request) -> Response:
        return json_response({"service": "CLIP as a microservice", "endpoints": _ENDPOINTS})

    async def _live(self, _: Request) -> Response:
        return json_response({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        """A full server is ready: it refuses some requests, and answers others."""
        if why := self.lifecycle.why_not_ready():
            return json_error(503, "UNAVAILABLE", why)
        return json_response({"status": "ready"})

    async def _proto(self, _: Request) -> Response:
        """The contract, from which clients in other languages are made."""
        proto = resources.files(clip_client.proto).joinpath("clip.proto").read_text("utf-8")
        return PlainTextResponse(proto)

    async def _openapi(self, _: Request) -> Response:
        return json_response(openapi.document())

    async def _reference(self, _: Request) -> Response:
        return reference()

    async def _empty(self, _: Request) -> Response:
        return Response(status_code=204)

    async def _empty_if_ready(self, request: Request) -> Response:
        response = await self._ready(request)
        return await self._empty(request) if response.status_code == 200 else response

    async def _dry_run(self, _: Request) -> Response:
        """Whether the flow answers, for Jina's clients."""
        status = jina_pb2.StatusProto.FromString(await self.jina.is_ready())
        return json_response({"code": status.code, "description": status.description})

    async def _metrics(self, _: Request) -> Response:
        text = await self.observer.metrics.exposition(self.router.metrics())
        return Response(text, media_type=CONTENT_TYPE)

    async def _info(self, request: Request) -> Response:
        asked = pb.InfoRequest(model=request.query_params.get("model", ""))
        info = await ask(self.call, pb.Request(info=asked), request)
        if PROTOBUF in request.headers.get("accept", ""):
            return protobuf_response(info)
        return json_response({**tei.describe(info), **_fields(info)})


def _fields(message: Message) -> dict[str, Any]:
    """A message as JSON, without the messages and optional numbers in it that are absent."""
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if isinstance(value, MutableSequence):
            fields[field.name] = list(value)
        else:
            fields[field.name] = _fields(value) if isinstance(value, Message) else value
    return fields


class _TableRouter(Router):
    """Looks paths without parameters up in a table: to try one route after the other costs a
    microsecond for each."""

    def __init__(self, routes: Sequence[Route], default: ASGIApp) -> None:
        super().__init__(routes, default=default)
        self._table = {
            (method, route.path): route
            for route in routes
            if not route.param_convertors
            for method in route.methods or ()
        }

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._table.get((scope["method"], scope["path"]))
        if route is None:
            await super().app(scope, receive, send)
            return
        scope["path_params"] = {}
        await route.app(scope, receive, send)


class _Server(uvicorn.Server):
    """uvicorn's server with a bound on the time of TLS handshakes, and a port that may be shared.

    handshake_seconds: None: without TLS.
    """

    def __init__(
        self, config: uvicorn.Config, handshake_seconds: float | None, shares_port: bool
    ) -> None:
        super().__init__(config)
        self._handshake_seconds, self._shares_port = handshake_seconds, shares_port

    async def startup(self, sockets: Any = None) -> None:
        del sockets
        config = self.config
        await self.lifespan.startup()
        protocol_class: Any = config.http_protocol_class
        protocol = partial(
            protocol_class,
            config=config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )
        server = await asyncio.get_running_loop().create_server(
            protocol,
            config.host,
            config.port,
            ssl=config.ssl,
            ssl_handshake_timeout=self._handshake_seconds,
            backlog=config.backlog,
            reuse_port=self._shares_port,
        )
        self.servers = [server]
        self.started = True


class _DialectErrors:
    """Has errors answered in the dialect of the path, whichever part of `app` refuses a request:
    for the lack of a key, for its method or body, or because the server is full or draining."""

    def __init__(self, app: ASGIApp, dialects: Sequence[Dialect]) -> None:
        self._app = app
        self._dialects = {
            _first_step(route.path): each.error for each in dialects for route in each.routes()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if dialect := self._dialects.get(_first_step(scope["path"])):
            answer_errors_in(dialect, scope)
        await self._app(scope, receive, send)


def _first_step(path: str) -> str:
    """`v1` of `/v1/embeddings`."""
    return path[1:].partition("/")[0]


class _DrainingApp:
    """Counts the requests of an application, and refuses new ones once the gateway is draining."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start" and self._lifecycle.is_draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        if scope["path"] in _PROBES:
            await self._app(scope, receive, send_and_close)
        elif refusal := self._lifecycle.refusal():
            response = await refuse(Request(scope), refusal)
            await response(scope, receive, send_and_close)
        else:
            with self._lifecycle.request():
                await self._app(scope, receive, send_and_close)
