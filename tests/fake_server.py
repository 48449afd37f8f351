"""A server for the tests of the client: the three transports, no model, faults on demand.

An embedding says what it is the embedding of: column 0 holds the first four bytes of the SHA-256
of the content, and column 1 its length. It runs in threads of the test's own process.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from websockets.sync.server import ServerConnection, serve

from clip_client.proto import clip_pb2

DIM = 4
LOGIT_SCALE = 100.0
SCHEMES = ("grpc", "http", "ws")
PROTOBUF = "application/x-protobuf"


def vector(content: str | bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[DIM] float32: the embedding of a content."""
    data = content.encode() if isinstance(content, str) else content
    digest = hashlib.sha256(data).digest()
    return np.array([int.from_bytes(digest[:2], "big"), len(data), digest[2], 1], np.float32)


class FakeServer:
    """Serves one scheme. The public attributes are the switches, and what it saw."""

    def __init__(self, scheme: str, port: int = 0, tls: tuple[Path, Path] | None = None) -> None:
        self.scheme = scheme
        # The files of a private key and its certificate.
        self._tls = tls
        self.requests: list[Any] = []
        # Ids of requests that were given up.
        self.cancelled: list[int] = []
        self.connections = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.delay = 0.0
        # Delays differ, so answers overtake each other.
        self.shuffle = False
        self.credential: str | None = None
        # Answers with this error: (code name, message).
        self.error: tuple[str, str] | None = None
        # Texts of each answer that it says it has cut.
        self.truncated = 0
        # Breaks the connection instead of answering, so many times.
        self.drops = 0
        # Over HTTP: the status of several requests in one, 0 where they are answered, and how many
        # HTTP requests came.
        self.shared_status = 0
        self.posts = 0
        # Set while requests may be answered.
        self.gate = threading.Event()
        self.gate.set()
        self._lock = threading.Lock()
        self._count = itertools.count()
        start = {"grpc": self._start_grpc, "http": self._start_http, "ws": self._start_ws}
        self.port, self._stop = start[scheme](port)

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def items(self) -> list[clip_pb2.Item]:
        return [item for request in self.requests for item in request.items]

    def stop(self) -> None:
        self.gate.set()
        self._stop()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def answer(self, request: clip_pb2.Request) -> clip_pb2.Response:
        with self._lock:
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.gate.wait()
        time.sleep(self.delay * (next(self._count) % 4 if self.shuffle else 1))
        with self._lock:
            self.in_flight -= 1
        if self.error:
            code, message = self.error
            return _failed(request.id, code, message)
        if request.HasField("info"):
            told = clip_pb2.InfoResponse(dim=DIM, logit_scale=LOGIT_SCALE, model="fake")
            return clip_pb2.Response(id=request.id, info=told)
        with self._lock:
            self.requests.append(request.encode)
        encoded = _encoded(request.encode)
        encoded.truncated = self.truncated
        return clip_pb2.Response(id=request.id, encode=encoded)

    def _context(self) -> ssl.SSLContext | None:
        if not self._tls:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._tls[1], self._tls[0])
        return context

    def admits(self, header: str | None) -> bool:
        return self.credential is None or header == f"Bearer {self.credential}"

    def drop(self) -> bool:
        """Whether to break the connection now."""
        with self._lock:
            self.drops -= 1
            return self.drops >= 0

    def _start_grpc(self, port: int) -> tuple[int, Any]:
        server = grpc.server(
            ThreadPoolExecutor(32),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)],
        )

        def check(context: grpc.ServicerContext) -> None:
            metadata = dict(context.invocation_metadata())
            if not self.admits(metadata.get("authorization")):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the credential is wrong")

        def stream(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            self.connections += 1
            check(context)
            yield from self._each(requests, context)

        def info(_: clip_pb2.InfoRequest, context: grpc.ServicerContext) -> clip_pb2.InfoResponse:
            check(context)
            return clip_pb2.InfoResponse(dim=DIM)

        handlers = {
            "Stream": grpc.stream_stream_rpc_method_handler(
                stream, clip_pb2.Requests.FromString, clip_pb2.Responses.SerializeToString
            ),
            "Info": grpc.unary_unary_rpc_method_handler(
                info, clip_pb2.InfoRequest.FromString, clip_pb2.InfoResponse.SerializeToString
            ),
        }
        generic = grpc.method_handlers_generic_handler("clip.v1.Clip", handlers)
        server.add_generic_rpc_handlers((generic,))
        address = f"127.0.0.1:{port}"
        if self._tls:
            pair = (self._tls[0].read_bytes(), self._tls[1].read_bytes())
            bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            bound = server.add_insecure_port(address)
        server.start()
        return bound, lambda: server.stop(None).wait()

    def _each(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Answers as they are ready, in any order."""
        answers: queue.Queue[clip_pb2.Response | None] = queue.Queue()

        def read() -> None:
            with ThreadPoolExecutor(32) as pool:
                try:
                    for request in self._wanted(requests):
                        pool.submit(lambda one: answers.put(self.answer(one)), request)
                except grpc.RpcError:
                    pass
            answers.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (response := answers.get()) is not None:
            if self.drop():
                context.abort(grpc.StatusCode.UNAVAILABLE, "dropped")
            yield clip_pb2.Responses(responses=[response])

    def _wanted(self, messages: Iterable[Any]) -> Iterator[Any]:
        """The requests in messages, and a note of those given up."""
        for message in messages:
            for request in message.requests:
                if request.HasField("cancel"):
                    self.cancelled.append(request.id)
                else:
                    yield request

    def _start_ws(self, port: int) -> tuple[int, Any]:
        open_sockets: list[ServerConnection] = []

        def handle(socket: ServerConnection) -> None:
            self.connections += 1
            open_sockets.append(socket)
            lock = threading.Lock()

            def reply(request: Any) -> None:
                response = self.answer(request)
                if self.drop():
                    socket.socket.shutdown(2)
                    return
                with lock:
                    socket.send(clip_pb2.Responses(responses=[response]).SerializeToString())

            messages = (clip_pb2.Requests.FromString(bytes(frame)) for frame in socket)
            with ThreadPoolExecutor(32) as pool:
                for request in self._wanted(messages):
                    pool.submit(reply, request)

        def check(socket: ServerConnection, request: Any) -> Any:
            if self.admits(request.headers.get("authorization")):
                return None
            return socket.respond(401, "the credential is wrong")

        server = serve(
            handle, "127.0.0.1", port, process_request=check, max_size=None, ssl=self._context()
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def stop() -> None:
            server.shutdown()
            for socket in open_sockets:
                socket.close()

        return server.socket.getsockname()[1], stop

    def _start_http(self, port: int) -> tuple[int, Any]:
        fake = self
        sockets: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Headers and body in one write: two would wait for each other (Nagle).
            wbufsize = -1

            def setup(self) -> None:
                super().setup()
                fake.connections += 1
                sockets.append(self.connection)

            def do_GET(self) -> None:
                self._answer(clip_pb2.Request(info=clip_pb2.InfoRequest()), "info")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.headers["content-type"] == PROTOBUF
                fake.posts += 1
                if self.path == "/":
                    self._answer_several(clip_pb2.Requests.FromString(body).requests)
                    return
                encode = clip_pb2.EncodeRequest.FromString(body)
                self._answer(clip_pb2.Request(encode=encode), self.path.strip("/"))

            def _answer(self, request: clip_pb2.Request, kind: str) -> None:
                if fake.admits(self.headers["authorization"]):
                    response = fake.answer(request)
                else:
                    response = _failed(0, "UNAUTHENTICATED", "the credential is wrong")
                if fake.drop():
                    self.close_connection = True
                    return
                failed = response.HasField("error")
                message = response.error if failed else getattr(response, kind)
                self._send(400 if failed else 200, message.SerializeToString())

            def _answer_several(self, requests: Iterable[Any]) -> None:
                if fake.shared_status:
                    self._send(fake.shared_status, b"")
                elif not fake.admits(self.headers["authorization"]):
                    wrong = _failed(0, "UNAUTHENTICATED", "the credential is wrong")
                    self._send(401, wrong.error.SerializeToString())
                else:
                    with ThreadPoolExecutor(32) as pool:
                        responses = list(pool.map(fake.answer, requests))
                    if fake.drop():
                        self.close_connection = True
                        return
                    # In another order than that of the requests.
                    together = clip_pb2.Responses(responses=responses[::-1])
                    self._send(200, together.SerializeToString())

            def _send(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("content-type", PROTOBUF)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: object) -> None:
                pass

        server = Server(("127.0.0.1", port), Handler)
        if context := self._context():
            server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

        def stop() -> None:
            server.shutdown()
            server.server_close()
            for socket in sockets:
                try:
                    socket.shutdown(2)
                except OSError:
                    continue

        return server.server_port, stop


def _failed(number: int, code: str, message: str) -> clip_pb2.Response:
    value = clip_pb2.Error.Code.Value(code)
    return clip_pb2.Response(id=number, error=clip_pb2.Error(code=value, message=message))


def _encoded(request: clip_pb2.EncodeRequest) -> clip_pb2.EncodeResponse:
    rows, errors = [], []
    for index, item in enumerate(request.items):
        content = getattr(item, item.WhichOneof("content") or "text")
        if content in ("bad", b"bad"):
            errors.append(clip_pb2.ItemError(index=index, message="not a picture"))
            rows.append(np.full(DIM, np.nan, np.float32))
        else:
            rows.append(vector(content))
    return clip_pb2.EncodeResponse(
        embeddings=np.array(rows, "<f4").tobytes(),
        count=len(rows),
        dim=DIM,
        errors=errors,
        timings=clip_pb2.Timings(total=3, preprocess=1, inference=2, gateway=1),
    )
