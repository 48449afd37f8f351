"""What else a server, or a proxy before it, may answer."""

from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from certificates import Pair, make_pair, needs_openssl
from fake_server import SCHEMES, FakeServer, vector
from websockets.sync.server import ServerConnection, serve

from clip_client import (
    AuthenticationError,
    Client,
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidInputError,
    OverloadedError,
    ServerError,
    background,
)
from clip_client.proto import clip_pb2

PROTOBUF = "application/x-protobuf"


@contextmanager
def http(status: int, content_type: str, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("location", "https://elsewhere/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "content_type", "body", "kind", "message"),
    [
        (502, "text/html", b"<h1>Bad Gateway</h1>", ServerError, "status 502: <h1>Bad"),
        (503, "text/plain", b"", ServerError, "status 503$"),
        (429, "text/plain", b"slow down", OverloadedError, "status 429: slow down"),
        (413, "text/plain", b"\xff\xfe", OverloadedError, "status 413"),
        (401, "", b"who are you?", AuthenticationError, "who are you?"),
        (404, "text/html", b"none", ServerError, "is this the address of a CLIP server"),
        (301, "text/html", b"moved", ServerError, "status 301: moved"),
        (500, PROTOBUF, b"\xff\xff", ServerError, "status 500"),
        (400, "application/json", b'{"error": "x"}', ServerError, "status 400"),
        (
            429,
            "application/json",
            b'{"error": {"code": "RESOURCE_EXHAUSTED", "message": "full"}}',
            OverloadedError,
            "^full$",
        ),
        (
            403,
            f"{PROTOBUF}; charset=x",
            clip_pb2.Error(code=clip_pb2.Error.UNAUTHENTICATED, message="no").SerializeToString(),
            AuthenticationError,
            "^no$",
        ),
        (200, "text/html", b"<h1>Welcome</h1>", ServerError, "not with a clip.v1 message"),
        (200, PROTOBUF, b"\xff\xff", ServerError, "not with a clip.v1 message"),
        (200, PROTOBUF, b"", ServerError, "the answer to 1 items holds 0 x 0"),
    ],
)
def test_http_answers(
    status: int, content_type: str, body: bytes, kind: type[ServerError], message: str
) -> None:
    with (
        http(status, content_type, body) as address,
        Client(address, connect_timeout=0.2) as client,
        pytest.raises(ServerError, match=message) as caught,
    ):
        client.encode(["a"])
    assert type(caught.value) is kind


def encode_together(client: Client, texts: Iterable[str], **options: Any) -> list[Any]:
    """The results of one call for each text, all of which are ready at the same moment."""

    async def run() -> list[Any]:
        held, released = threading.Event(), threading.Event()

        async def hold() -> None:
            held.set()
            released.wait()

        background.submit(hold())  # the event loop that sends requests
        held.wait()
        calls = [asyncio.create_task(client.aencode([text], **options)) for text in texts]
        await asyncio.sleep(0)
        released.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(run())


@pytest.fixture
def shared() -> Iterator[tuple[FakeServer, Client]]:
    with FakeServer("http") as server, Client(server.address) as client:
        yield server, client


TEXTS = [f"text {number}" for number in range(20)]
EXPECTED = np.array([[vector(text)] for text in TEXTS])


def test_small_requests_share_an_http_request(shared: tuple[FakeServer, Client]) -> None:
    server, client = shared
    np.testing.assert_array_equal(encode_together(client, TEXTS), EXPECTED)
    assert server.posts == 4
    long = [each * 1000 for each in TEXTS[:5]]
    assert len(encode_together(client, long)) == 5
    client.encode(TEXTS, batch_size=10)
    assert server.posts == 4 + 5 + 2


@pytest.mark.parametrize("status", [200, 301, 404])
def test_a_server_that_takes_no_shared_requests(
    shared: tuple[FakeServer, Client], status: int
) -> None:
    """Or one that has something else at the root."""
    server, client = shared
    server.shared_status = status
    for _ in range(2):
        np.testing.assert_array_equal(encode_together(client, TEXTS), EXPECTED)
    assert server.posts == 4 + 2 * len(TEXTS)  # it is tried once


def test_shared_requests_fail_and_are_sent_again_each_by_itself(
    shared: tuple[FakeServer, Client],
) -> None:
    server, client = shared
    server.drops = 2
    np.testing.assert_array_equal(encode_together(client, TEXTS), EXPECTED)
    found = encode_together(client, ["good", "bad"], on_item_error="return")
    assert [len(errors) for _, errors in found] == [0, 1]
    server.credential = "secret"
    failed = encode_together(client, TEXTS)
    assert {type(error) for error in failed} == {AuthenticationError}


def test_a_shared_request_that_is_given_up_hurts_no_other(
    shared: tuple[FakeServer, Client],
) -> None:
    server, client = shared
    server.gate.clear()
    found = encode_together(client, TEXTS, timeout=0.2)
    assert {type(error) for error in found} == {DeadlineExceededError}
    server.gate.set()
    np.testing.assert_array_equal(encode_together(client, TEXTS), EXPECTED)


def test_a_path_before_the_routes() -> None:
    with (
        http(404, "text/plain", b"") as address,
        Client(f"{address}/clip/") as client,
        pytest.raises(ServerError, match="/clip/encode answered with status 404"),
    ):
        client.encode(["a"])


def test_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with http(502, "text/plain", b"the proxy") as proxy:
        monkeypatch.setenv("all_proxy", proxy)
        with (
            Client("http://clip.invalid", connect_timeout=0.2) as client,
            pytest.raises(ServerError, match="the proxy"),
        ):
            client.encode(["a"])
        monkeypatch.setenv("no_proxy", ".invalid")
        with (
            Client("http://clip.invalid", connect_timeout=0.2) as client,
            pytest.raises(ConnectionFailedError),
        ):
            client.encode(["a"])
        monkeypatch.delenv("no_proxy")
        # It takes no CONNECT. Its password is for no one's log.
        monkeypatch.setenv("https_proxy", proxy.replace("//", "//me:secret@"))
        with (
            Client("https://clip.invalid", connect_timeout=0.2) as client,
            pytest.raises(ConnectionFailedError, match="broke: 501") as caught,
        ):
            client.encode(["a"])
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with (
        Client("http://clip.invalid", connect_timeout=0.2) as client,
        pytest.raises(InvalidInputError, match="socks5"),
    ):
        client.encode(["a"])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tls"))


@needs_openssl
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tls(scheme: str, certificate: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeServer(scheme, tls=certificate) as server:
        secure = f"{scheme}s://127.0.0.1:{server.port}"
        with (
            Client(secure) as client,
            pytest.raises(ConnectionFailedError, match=r"(?i)certif|ssl"),
        ):
            client.encode(["a"])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.certificate))
        with Client(secure) as client:
            assert len(client.encode(["a"])) == 1
        plain, started = Client(server.address), time.monotonic()
        with plain, pytest.raises(ConnectionFailedError, match=f"speaks TLS .* is {secure}"):
            plain.encode(["a"])
        assert time.monotonic() - started < 20  # though gRPC's server does not end the connection


@needs_openssl
@pytest.mark.parametrize("scheme", SCHEMES)
def test_whom_to_trust(scheme: str, certificate: Pair) -> None:
    with FakeServer(scheme, tls=certificate) as server:
        secure = f"{scheme}s://localhost:{server.port}"
        with Client(secure) as client, pytest.raises(ConnectionFailedError) as caught:
            client.encode(["a"])
        for word in ("not trusted", "self", "ca_file=", "SSL_CERT_FILE", "verify=False"):
            assert word in str(caught.value)
        with Client(secure, ca_file=certificate.certificate) as client:
            assert len(client.encode(["a"])) == 1
        with pickle.loads(pickle.dumps(client)) as again:
            assert len(again.encode(["a"])) == 1
        with Client(secure, verify=False) as client:
            assert len(client.encode(["a"])) == 1
    with FakeServer(scheme) as server:
        address = f"{scheme}s://127.0.0.1:{server.port}"
        with (
            Client(address, connect_timeout=0.2) as client,
            pytest.raises(ConnectionFailedError, match=f"not speak TLS .* {server.address}"),
        ):
            client.encode(["a"])


@needs_openssl
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("names", "days", "message"),
    [("DNS:elsewhere.example", 2, "another name"), ("DNS:localhost", -1, "out of date")],
)
def test_certificates_that_do_not_fit(
    scheme: str, names: str, days: int, message: str, tmp_path: Path
) -> None:
    pair = make_pair(tmp_path, names=names, days=days)
    with FakeServer(scheme, tls=pair) as server:
        secure = f"{scheme}s://localhost:{server.port}"
        with (
            Client(secure, ca_file=pair.certificate) as client,
            pytest.raises(ConnectionFailedError, match=message),
        ):
            client.encode(["a"])
        if days > 0:
            with Client(secure, verify=False) as client:
                assert len(client.encode(["a"])) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_wrong_certificate_files(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.pem").touch()
    (tmp_path / "text.pem").write_text("no certificate")
    for name in ("missing.pem", "empty.pem", "text.pem", "."):
        with pytest.raises(InvalidInputError, match=f"ca_file names .*{name}"):
            Client(f"{scheme}s://127.0.0.1:1", ca_file=tmp_path / name)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        with (
            Client(f"{scheme}s://127.0.0.1:1") as client,
            pytest.raises(InvalidInputError, match=f"SSL_CERT_FILE names .*{name}"),
        ):
            client.encode(["a"])
    with pytest.raises(InvalidInputError, match="ca_file names a file"):
        Client(f"{scheme}s://127.0.0.1:1", verify="ca.pem")  # type: ignore[arg-type]


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY", "grpc_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:9")


@pytest.mark.usefixtures("dead_proxy")
def test_this_machine_is_reached_without_a_proxy(scheme_server: FakeServer) -> None:
    for host in ("127.0.0.1", "localhost"):
        with Client(f"{scheme_server.scheme}://{host}:{scheme_server.port}") as client:
            assert len(client.encode(["a"])) == 1


@pytest.mark.usefixtures("dead_proxy")
@pytest.mark.parametrize("scheme", ["grpc", "grpcs", "http", "https", "ws", "wss"])
def test_a_dead_proxy_is_named(scheme: str) -> None:
    with (
        Client(f"{scheme}://192.0.2.1:51000", connect_timeout=0.2) as client,
        pytest.raises(ConnectionFailedError, match=r"proxy http://127.0.0.1:9 .*refused") as caught,
    ):
        client.encode(["a"])
    assert "NO_PROXY=192.0.2.1" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("dead_proxy")
def test_a_dead_proxy_is_named_for_an_image(scheme_server: FakeServer) -> None:
    with Client(scheme_server.address) as client:
        _, failures = client.encode(["http://192.0.2.1/cat.jpg"], on_item_error="return")
    assert "through the proxy http://127.0.0.1:9: Connection refused" in failures[0].message
    assert failures[0].item == "http://192.0.2.1/cat.jpg"


@pytest.fixture(params=SCHEMES)
def scheme_server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with FakeServer(request.param) as fake:
        yield fake


@contextmanager
def websocket(handle: Callable[[ServerConnection], None]) -> Iterator[str]:
    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("frame", ["text", b"\xff\xff"])
def test_websocket_frames_that_are_none_of_ours(frame: str | bytes) -> None:
    def handle(socket: ServerConnection) -> None:
        socket.recv()
        socket.send(frame)

    with (
        websocket(handle) as address,
        Client(address, connect_timeout=0.2) as client,
        pytest.raises(ServerError, match=r"no clip\.v1\.Response"),
    ):
        client.encode(["a"])


def test_an_error_that_names_no_request_is_about_all() -> None:
    def handle(socket: ServerConnection) -> None:
        socket.recv()
        error = clip_pb2.Error(code=clip_pb2.Error.RESOURCE_EXHAUSTED, message="too long a frame")
        response = clip_pb2.Response(error=error)
        socket.send(clip_pb2.Responses(responses=[response]).SerializeToString())

    with (
        websocket(handle) as address,
        Client(address, connect_timeout=0.2) as client,
        pytest.raises(OverloadedError, match="too long a frame"),
    ):
        client.encode(["a", "b"], batch_size=1)


def test_a_closed_websocket_says_why() -> None:
    def handle(socket: ServerConnection) -> None:
        socket.recv()
        socket.close(1009, "frame too large")

    with (
        websocket(handle) as address,
        Client(address, connect_timeout=0.2) as client,
        pytest.raises(ConnectionFailedError, match=r"1009 .*frame too large"),
    ):
        client.encode(["a"])


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
        (grpc.StatusCode.UNAVAILABLE, ConnectionFailedError),
    ],
)
def test_grpc_statuses(code: grpc.StatusCode, kind: type[Exception]) -> None:
    with FakeServer("grpc") as server, Client(server.address) as client:

        def abort(_: Any, context: grpc.ServicerContext) -> Any:
            context.abort(code, "because")

        server._each = abort  # type: ignore[method-assign]
        # Where the stream is sent again, gRPC may hide the reason.
        with pytest.raises(kind, match=r"because|the stream broke"):
            client.encode(["a"])


@pytest.mark.parametrize(
    "response",
    [
        clip_pb2.EncodeResponse(count=1, dim=4, embeddings=bytes(15)),
        clip_pb2.EncodeResponse(count=2, dim=4, embeddings=bytes(32)),
        clip_pb2.EncodeResponse(
            count=1, dim=4, embeddings=bytes(16), errors=[clip_pb2.ItemError(index=9)]
        ),
    ],
)
def test_answers_that_do_not_fit(response: clip_pb2.EncodeResponse) -> None:
    with FakeServer("ws") as server, Client(server.address) as client:

        def answer(request: clip_pb2.Request) -> clip_pb2.Response:
            return clip_pb2.Response(id=request.id, encode=response)

        server.answer = answer  # type: ignore[method-assign]
        with pytest.raises(ServerError, match="the answer to 1 items holds"):
            client.encode(["a"])


def test_a_request_that_times_out_hurts_no_other() -> None:
    with FakeServer("grpc") as server, Client(server.address) as client:
        answer, late = server.answer, threading.Event()

        def answer_late(request: clip_pb2.Request) -> clip_pb2.Response:
            if request.encode.items[0].text == "late":
                late.wait()
            return answer(request)

        server.answer = answer_late  # type: ignore[method-assign]
        with ThreadPoolExecutor(2) as pool:
            fails = pool.submit(client.encode, ["late"], timeout=0.3)
            works = pool.submit(client.encode, ["a", "b"], batch_size=1)
            assert len(works.result()) == 2
            with pytest.raises(DeadlineExceededError):
                fails.result()
        late.set()
        assert len(client.encode(["c"])) == 1
        assert server.connections == 1
