"""Compressed requests and responses on every protocol, and bombs."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from conftest import PATIENCE_SECONDS, SAMPLES, Http, Server, Start, flow
from grpc_health.v1 import health_pb2, health_pb2_grpc
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from clip_client import Client, InvalidInputError, TruncationWarning
from clip_client.proto import clip_pb2 as pb
from clip_server.gateway import compressing_app

CAT = (SAMPLES / "cat.png").read_bytes()
TEXTS = [f"a cat of {years} years" for years in range(40)]
BODY = json.dumps({"data": TEXTS}).encode()
# Of the gateway, while it refuses a bomb of 1 GiB.
MOST_GROWTH_MIB = 100


def bomb(wbits: int, head: bytes = b"") -> bytes:
    """1 GiB of zeros, in about 1 MiB. Its checksum is wrong, which shows at its end only."""
    packer = zlib.compressobj(9, wbits=wbits)
    start = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + 64 * block + packer.flush(zlib.Z_FINISH)


@contextmanager
def bounded_memory(server: Server) -> Iterator[None]:
    """Fails if the largest growth of a process of the server is above the bound."""
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    before = [each.memory_info().rss for each in processes]
    growth, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            now = [each.memory_info().rss for each in processes]
            growth.extend(b - a for a, b in zip(before, now, strict=True))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert max(growth) >> 20 < MOST_GROWTH_MIB


def post(http: Http, body: bytes, encoding: str, path: str = "/encode") -> Any:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return http.post(path, data=body, headers=headers)


def embeddings(answer: Any) -> Any:
    return np.array([each["embedding"] for each in answer.json()["data"]])


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZip", gzip.compress(BODY)),
        ("x-gzip", gzip.compress(BODY)),
        ("gzip", gzip.compress(BODY[:99]) + gzip.compress(BODY[99:])),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
        # Large enough for a thread.
        ("gzip", gzip.compress(BODY + b" " * (12 << 20))),
    ],
)
def test_compressed_bodies(http: Http, encoding: str, body: bytes) -> None:
    answer = post(http, body, encoding)
    assert answer.status_code == 200, answer.text
    plain = embeddings(http.post("/encode", data=BODY))
    np.testing.assert_allclose(embeddings(answer), plain, rtol=1e-4, atol=1e-5)


def test_other_apis_and_protobuf_take_compressed_bodies(http: Http) -> None:
    body = gzip.compress(json.dumps({"input": ["a cat"], "model": ""}).encode())
    assert post(http, body, "gzip", "/v1/embeddings").status_code == 200
    request = pb.EncodeRequest(items=[pb.Item(image=CAT), pb.Item(text="a cat")])
    headers = {"content-type": "application/x-protobuf", "content-encoding": "gzip"}
    answer = http.post("/encode", data=gzip.compress(request.SerializeToString()), headers=headers)
    assert answer.status_code == 200
    assert pb.EncodeResponse.FromString(answer.content).count == 2


@pytest.mark.parametrize(
    ("path", "content_type", "body", "says"),
    [
        ("/encode", "application/json", b'{"data": [' + b"[]," * 10**6 + b"1]}", "brackets"),
        ("/encode", "application/json", b'{"data": [' + b'"",' * 2_000_001 + b"1]}", "quotation"),
        ("/v1/embeddings", "", b'{"input": [' + b'"a",' * 200_000 + b'"a"]}', "200,001 items"),
        ("/encode", "application/x-protobuf", b"\x0a\0" * 1_100_000, "1,000,000 fields"),
        ("/rank", "application/x-protobuf", b"\x12\0" * 1_100_000, "1,000,000 fields"),
        ("/", "application/x-protobuf", b"\x0a\0" * 1_100_000, "1,000,000 fields"),
        ("/encode", "application/x-protobuf", b"\x0a\0" * 200_000, "200,000 items"),
    ],
)
def test_bodies_of_too_many_parts(
    http: Http, path: str, content_type: str, body: bytes, says: str
) -> None:
    """They are refused before they are looked at, which would take the gateway many seconds."""
    headers = {"content-type": content_type, "content-encoding": "gzip"}
    answer = http.post(path, data=gzip.compress(body), headers=headers)
    assert answer.status_code == 400
    assert says in answer.text


@pytest.mark.slow
def test_messages_of_too_many_parts(onnx_server: Server) -> None:
    message = b"\x0a\0" * 1_100_000
    with onnx_server.channel() as channel:
        for method in ("clip.v1.Clip/Encode", "jina.JinaSingleDataRequestRPC/process_single_data"):
            call = channel.unary_unary(f"/{method}").future(message, timeout=PATIENCE_SECONDS)
            assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "1,000,000 fields" in call.details()
        stream = channel.stream_stream("/clip.v1.Clip/Stream")
        (answer,) = stream(iter([message]), timeout=PATIENCE_SECONDS)
    with connect(onnx_server.websocket, proxy=None) as link:
        link.send(message)
        for each in (answer, link.recv(PATIENCE_SECONDS)):
            (response,) = pb.Responses.FromString(each).responses
            assert "1,000,000 fields" in response.error.message


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        gzip.compress(BODY)[:-1],
        gzip.compress(BODY)[:-8] + bytes(8),
        gzip.compress(BODY) + b"more",
        zlib.compress(BODY),
        b"\x1f",
    ],
)
def test_damaged_bodies(http: Http, body: bytes) -> None:
    answer = post(http, body, "gzip")
    assert answer.status_code == 400
    assert "damaged, incomplete" in answer.json()["error"]["message"]


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress", "\xff"])
def test_unknown_encodings(http: Http, encoding: str) -> None:
    answer = post(http, gzip.compress(BODY), encoding)
    assert answer.status_code == 415
    assert "allowed are gzip, deflate" in answer.json()["error"]["message"]


def test_bombs_over_http(onnx_server: Server, http: Http) -> None:
    for encoding, wbits in (("gzip", 31), ("deflate", 15)):
        packed = bomb(wbits, head=b'{"data": ["')
        assert len(packed) < 2 << 20
        with bounded_memory(onnx_server):
            answer = post(http, packed, encoding)
        assert answer.status_code == 413, answer.text
        assert "32 times" in answer.json()["error"]["message"]
    assert post(http, gzip.compress(BODY), "gzip").status_code == 200


def test_the_limit_holds_for_the_inflated_body(http: Http) -> None:
    """Also for one that grows little."""
    body = gzip.compress(np.random.default_rng(0).bytes(6 << 20) + bytes(130 << 20), 1)
    answer = post(http, body, "gzip")
    assert answer.status_code == 413
    assert "128 MiB" in answer.json()["error"]["message"]


def ask(socket: ClientConnection, texts: list[str]) -> pb.Response:
    request = pb.Request(
        id=1, encode=pb.EncodeRequest(items=[pb.Item(text=each) for each in texts])
    )
    socket.send(pb.Requests(requests=[request]).SerializeToString())
    frame = socket.recv(60)
    assert isinstance(frame, bytes)
    (response,) = pb.Responses.FromString(frame).responses
    return response


def test_compressed_frames(onnx_server: Server) -> None:
    answers = []
    for compression in ("deflate", None):
        with connect(onnx_server.websocket, compression=compression, proxy=None) as socket:
            names = [each.name for each in socket.protocol.extensions]
            assert names == (["permessage-deflate"] if compression else [])
            answers += [ask(socket, TEXTS).encode for _ in range(2)]
    vectors = [np.frombuffer(each.embeddings, "<f4") for each in answers]
    for each in vectors:
        np.testing.assert_allclose(each, vectors[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fragments", [1, 64])
def test_bombs_over_websocket(onnx_server: Server, fragments: int) -> None:
    packed = bomb(-15)
    size = -(-len(packed) // fragments)
    with connect(onnx_server.websocket, proxy=None) as socket:
        assert socket.protocol.extensions
        socket.protocol.extensions = [Packed()]  # the frames are sent as they are
        with bounded_memory(onnx_server), pytest.raises(ConnectionClosed) as closed:
            converse(socket, [packed[i : i + size] for i in range(0, len(packed), size)])
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1009
        assert "limit" in closed.value.rcvd.reason
    with connect(onnx_server.websocket, proxy=None) as socket:
        assert ask(socket, ["a cat"]).encode.count == 1


def converse(socket: ClientConnection, fragments: list[bytes]) -> None:
    socket.send(fragments)
    socket.recv(60)


class Packed:
    """An extension that marks frames as compressed, and leaves them alone."""

    def encode(self, frame: Any) -> Any:
        frame.rsv1 = frame.opcode in (1, 2)
        return frame

    def decode(self, frame: Any, *, max_size: int | None = None) -> Any:
        del max_size
        return frame


COMPRESSIONS = [grpc.Compression.Gzip, grpc.Compression.Deflate]


def open_channel(server: Server, compression: grpc.Compression) -> grpc.Channel:
    return server.channel([("grpc.max_send_message_length", -1)], compression)


@pytest.mark.parametrize("compression", [*COMPRESSIONS, grpc.Compression.NoCompression])
def test_compressed_messages(onnx_server: Server, compression: grpc.Compression) -> None:
    encode = pb.EncodeRequest(items=[pb.Item(text="a cat") for _ in range(500)])
    stream = pb.Requests(requests=[pb.Request(id=1, encode=encode)])
    with open_channel(onnx_server, compression) as channel:
        unary: Any = channel.unary_unary("/clip.v1.Clip/Encode")
        assert pb.EncodeResponse.FromString(unary(encode.SerializeToString())).count == 500
        streamed: Any = channel.stream_stream("/clip.v1.Clip/Stream")
        for answer in streamed(iter([stream.SerializeToString()])):
            (response,) = pb.Responses.FromString(answer).responses
            assert response.encode.count == 500
        stub = health_pb2_grpc.HealthStub(channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(health_pb2.HealthCheckRequest(service="clip.v1.Clip")).status == serving


def test_bombs_over_grpc(onnx_server: Server) -> None:
    with open_channel(onnx_server, grpc.Compression.Gzip) as channel:
        unary: Any = channel.unary_unary("/clip.v1.Clip/Encode")
        streamed: Any = channel.stream_stream("/clip.v1.Clip/Stream")
        jina: Any = channel.stream_stream("/jina.JinaRPC/Call")
        # gRPC itself would refuse more than 128 MiB, once it has inflated them.
        zeros = bytes(127 << 20)
        for call in (unary, lambda each: list(streamed(iter([each]))),
                     lambda each: list(jina(iter([each])))):  # fmt: skip
            with bounded_memory(onnx_server), pytest.raises(grpc.RpcError) as refused:
                call(zeros)
            error: Any = refused.value
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error.details()
            assert "32 times" in error.details()
    assert "Traceback" not in onnx_server.output()


@pytest.mark.slow
def test_responses_are_compressed_where_the_flow_says_so(start: Start, onnx_server: Server) -> None:
    spec = flow("onnx")
    spec.setdefault("with", {})["compression"] = "Gzip"
    server = start(spec)
    with Http(server.http) as http, Http(onnx_server.http) as other:
        packed, plain = (each.post("/encode", data=BODY) for each in (http, other))
        assert packed.headers["content-encoding"] == "gzip"
        assert "content-encoding" not in plain.headers
        np.testing.assert_allclose(embeddings(packed), embeddings(plain), rtol=1e-4, atol=1e-5)
        unasked = http.post("/encode", data=BODY, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in unasked.headers
        assert "content-encoding" not in http.get("/livez").headers
    with connect(server.websocket, proxy=None) as socket:
        for texts in (["a cat"], TEXTS):  # the second is large enough for a thread
            response = ask(socket, texts).encode
            assert response.count == len(texts)


def test_a_large_response_is_compressed_while_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The compression waits for another request, which would never be answered after it."""
    answered = threading.Event()
    compress = compressing_app._gzip

    def compress_late(content: bytes) -> bytes:
        assert answered.wait(PATIENCE_SECONDS)
        return compress(content)

    monkeypatch.setattr(compressing_app, "_gzip", compress_late)
    app = Starlette(
        routes=[
            Route("/large", lambda _: Response(bytes(1 << 20))),
            Route("/small", lambda _: Response("small")),
        ],
        middleware=[Middleware(compressing_app.CompressingApp)],
    )

    async def get(path: str) -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("a GET has no body")

        headers = [(b"accept-encoding", b"br;q=1.0, gzip;q=0.8")]
        scope = {"type": "http", "method": "GET", "path": path, "headers": headers}
        await app(scope, receive, send)
        return sent

    async def get_both() -> list[Any]:
        large = asyncio.create_task(get("/large"))
        await asyncio.sleep(0)
        assert (await get("/small"))[1]["body"] == b"small"
        answered.set()
        return await large

    start, body = asyncio.run(get_both())
    assert (b"content-encoding", b"gzip") in start["headers"]
    assert gzip.decompress(body["body"]) == bytes(1 << 20)


@pytest.mark.parametrize("accepted", ["", "br", "gzip;q=0", "br, gzip; q=0.0", "identity"])
def test_who_does_not_accept_gzip_gets_none(accepted: str) -> None:
    assert not compressing_app._accepts_gzip(accepted)


class Relay:
    """Forwards connections to a port, and counts the bytes that clients send."""

    def __init__(self, port: int) -> None:
        self.sent, self._port = 0, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if target.getpeername()[1] == self._port:
                    self.sent += len(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()


@pytest.mark.parametrize("compression", ["gzip", "Deflate"])
@pytest.mark.parametrize("scheme", ["grpc", "http", "ws"])
def test_the_client_compresses_its_requests(
    onnx_server: Server, scheme: str, compression: str
) -> None:
    texts = ["a cat that sleeps " * 200 + str(number) for number in range(20)]
    relay = Relay(onnx_server.ports[["grpc", "http", "ws"].index(scheme)])
    with Client(onnx_server.grpc) as client, pytest.warns(TruncationWarning):
        expected = client.encode(texts)
    address = f"{scheme}://127.0.0.1:{relay.port}"
    with Client(address, compression=compression) as client, pytest.warns(TruncationWarning):
        np.testing.assert_allclose(client.encode(texts), expected, atol=1e-4)
    assert 0 < relay.sent < sum(map(len, texts)) / 5
    relay.close()


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="gzip, deflate or None, not 'br'"):
        Client("grpc://127.0.0.1:1", compression="br")
