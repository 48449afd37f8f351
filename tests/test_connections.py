"""Bounds on connections: how many, how slow, how old."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from threading import Event

import grpc
import numpy as np
import pytest
import requests
from conftest import PATIENCE_SECONDS, Server, Start, eventually, flow
from grpc_health.v1 import health_pb2, health_pb2_grpc
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from clip_client import Client, ConnectionFailedError, ServerError
from clip_server.errors import ConfigurationError
from clip_server.launch.flow import prepare

# No connection may be too old before MOST are open, on a busy machine either.
TIMEOUT, AGE, MOST = 0.5, 2.0, 12
OF_ADDRESS = f"{MOST} connections from one address (max_connections_per_address)"
BODY = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"


@pytest.fixture(scope="module")
def strict(start: Start) -> Server:
    spec = flow()
    spec["with"] |= {
        "header_timeout": TIMEOUT,
        "body_timeout": TIMEOUT,
        "max_connection_age": AGE,
        "max_connections_per_address": MOST,
        "max_request_bytes": 1 << 20,
        "max_queued_bytes": 1 << 20,
    }
    return start(spec)


@pytest.mark.parametrize(
    ("sent", "bound"),
    [(b"GET /livez HTTP/1.1\r\nx: y", "header_timeout"), (BODY, "body_timeout")],
    ids=["headers", "body"],
)
def test_slow_requests_are_cut_off(strict: Server, sent: bytes, bound: str) -> None:
    with socket.create_connection(("127.0.0.1", strict.ports[1]), 30) as connection:
        connection.sendall(sent)
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"x-request-id: " in answer
    assert bound.encode() in answer
    assert f"{TIMEOUT:g} s".encode() in answer


def send_slowly(link: ClientConnection, is_fragmented: bool) -> None:
    """Sends a message that does not come to its end."""

    def fragments() -> Iterator[bytes]:
        while True:
            yield b"x"
            time.sleep(TIMEOUT / 5)

    if is_fragmented:
        link.send(fragments())
    else:
        link.socket.sendall(b"\x82\xfe\xff\xffmaskx")  # the start of a frame of 64 KiB
    link.recv(PATIENCE_SECONDS)


@pytest.mark.parametrize("is_fragmented", [True, False])
def test_a_slow_message_is_cut_off(strict: Server, is_fragmented: bool) -> None:
    with (
        connect(strict.websocket, proxy=None) as link,
        pytest.raises(ConnectionClosed) as raised,
    ):
        send_slowly(link, is_fragmented)
    closed = raised.value.rcvd
    assert closed is not None
    assert closed.code == 1008
    assert closed.reason == f"the message did not come within {TIMEOUT:g} s (body_timeout)"


def test_a_message_of_too_many_fragments_is_refused(strict: Server) -> None:
    """Empty ones, which no limit on the size of a message would stop."""
    with connect(strict.websocket, proxy=None) as link:
        link.socket.sendall(b"\x02\x80mask" + b"\x00\x80mask" * 4096)
        with pytest.raises(ConnectionClosed) as raised:
            link.recv(PATIENCE_SECONDS)
    closed = raised.value.rcvd
    assert closed is not None
    assert (closed.code, closed.reason) == (1009, "the message has more than 4,096 fragments")


@pytest.mark.parametrize("method", ["/clip.v1.Clip/Encode", "/jina.JinaGatewayDryRunRPC/dry_run"])
def test_a_grpc_call_whose_message_does_not_come_is_ended(strict: Server, method: str) -> None:
    def messages() -> Iterator[bytes]:
        has_ended.wait(PATIENCE_SECONDS)
        yield b""

    has_ended = Event()
    with strict.channel() as channel:
        call = channel.stream_unary(method).future(messages(), timeout=PATIENCE_SECONDS)
        assert call.exception() is not None
        has_ended.set()
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "(body_timeout)" in call.details()
    assert len(dict(call.trailing_metadata())["x-request-id"]) == 32


def test_a_grpc_call_without_a_message_is_refused(strict: Server) -> None:
    with strict.channel() as channel, pytest.raises(grpc.RpcError) as raised:
        channel.stream_unary("/clip.v1.Clip/Encode")(iter(()))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no message" in raised.value.details()


def test_pings_are_read_no_faster_than_their_answers(onnx_server: Server) -> None:
    """The answers would fill the memory of the server."""
    handshake = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    ping, pong = b"\x89\xfdmask" + bytes(125), 127
    unsent = memoryview(ping * 160_000)  # 20 MB, far more than buffers of the system hold
    most = len(unsent) // len(ping) * pong
    with socket.socket() as connection:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, 64 << 10)
        connection.connect(("127.0.0.1", onnx_server.ports[2]))
        connection.sendall(handshake)
        assert connection.recv(1000).startswith(b"HTTP/1.1 101 ")
        connection.settimeout(0.5)
        with suppress(TimeoutError):
            while unsent:
                unsent = unsent[connection.send(unsent[: 1 << 16]) :]
        assert unsent
        connection.settimeout(PATIENCE_SECONDS)
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(connection.sendall, unsent)
            received = 0
            while received < most and (part := connection.recv(1 << 16)):
                received += len(part)
            sending.result()
        assert received == most


def test_requests_that_do_not_come_whole_take_bounded_memory(strict: Server) -> None:
    """Of several half requests the last is refused; those of clients that are gone do not count."""
    half = bytes(600_000)
    body = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" + half
    frame = b"\x82\xff" + (1_000_000).to_bytes(8, "big") + b"mask" + half

    def is_refused() -> bool:
        with socket.create_connection(("127.0.0.1", strict.ports[1]), 30) as second:
            second.settimeout(TIMEOUT)
            with suppress(TimeoutError):
                second.sendall(body)
                return b"(max_queued_bytes)" in second.recv(1000)
        return False

    with socket.create_connection(("127.0.0.1", strict.ports[1]), 30) as first:
        first.sendall(body)
        assert eventually(is_refused)
        with connect(strict.websocket, proxy=None) as link:
            link.socket.sendall(frame)
            with pytest.raises(ConnectionClosed) as raised:
                link.recv(PATIENCE_SECONDS)
    assert raised.value.rcvd is not None
    assert raised.value.rcvd.code == 1013
    assert "(max_queued_bytes)" in raised.value.rcvd.reason
    assert eventually(lambda: not is_refused())


def test_a_response_that_is_not_read_is_given_up(strict: Server) -> None:
    body = json.dumps({"data": ["a cat"] * 5_000}).encode()
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    def is_open() -> bool:
        of_port = (each for each in gateway.net_connections() if each.laddr.port == port)
        return any(each.raddr and each.raddr.port == own for each in of_port)

    port = strict.ports[1]
    gateway = next(
        process
        for process in strict.family()
        if any(each.laddr.port == port for each in process.net_connections())
    )
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        own = connection.getsockname()[1]
        connection.sendall(head + body)
        assert connection.recv(1) == b"H"
        assert eventually(lambda: not is_open())


@pytest.mark.parametrize("port", [1, 2], ids=["http", "websocket"])
def test_a_connection_that_sends_nothing_is_closed(strict: Server, port: int) -> None:
    with socket.create_connection(("127.0.0.1", strict.ports[port]), 30) as connection:
        assert connection.recv(1000) == b""


def test_large_headers_are_refused_with_the_limit(strict: Server) -> None:
    answer = requests.get(f"{strict.http}/livez", headers={"x": "y" * 100_000})
    assert answer.status_code == 431
    assert "64 KiB" in answer.json()["error"]["message"]
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("headers", "status"),
    [({}, 426), ({"x-request-id": "mine"}, 426), ({"x": "y" * 10_000}, 431)],
    ids=["no upgrade", "named", "large"],
)
def test_what_is_no_websocket_handshake_is_refused(
    onnx_server: Server, headers: dict[str, str], status: int
) -> None:
    before = onnx_server.metrics()["errors"]
    answer = requests.get(onnx_server.websocket.replace("ws:", "http:"), headers=headers)
    assert answer.status_code == status
    assert answer.text.startswith("Failed to open a WebSocket connection: ")
    name = answer.headers["x-request-id"]
    assert name == headers.get("x-request-id", name)
    assert onnx_server.metrics()["errors"] == before + 1


@pytest.mark.parametrize(
    ("request_line", "status", "message"),
    [
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1", b"431 ", b"64 KiB"),
        (b"GET", b"400 ", b"not valid HTTP/1.1"),
        (b"GET /livez HTTP/1.1\r\ncontent-length: -1", b"400 ", b"not valid HTTP/1.1"),
    ],
    ids=["long", "short", "negative"],
)
def test_what_is_no_http_is_refused(
    strict: Server, request_line: bytes, status: bytes, message: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", strict.ports[1]), 30) as connection:
        connection.sendall(request_line + b"\r\nhost: x\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert message in answer
    assert b"x-request-id: " in answer


def test_too_many_connections_of_one_address(strict: Server) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            stack.enter_context(connect(strict.websocket, proxy=None))
        refused = requests.get(f"{strict.http}/livez")
        assert refused.status_code == 429
        assert OF_ADDRESS in refused.json()["error"]["message"]
        with pytest.raises(InvalidStatus) as raised, connect(strict.websocket, proxy=None):
            pass
        assert raised.value.response.status_code == 429
        assert "server" not in raised.value.response.headers
        for headers in (refused.headers, raised.value.response.headers):
            assert headers["retry-after"] == "1"
            assert len(headers["x-request-id"]) == 32
        waiting = [Client(each) for each in (strict.http, strict.websocket)]
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(each.encode, ["a cat"]) for each in waiting]
            stack.close()
            assert [len(call.result()) for call in calls] == [1, 1]  # once it is their turn
    for client in waiting:
        client.close()


def info(channel: grpc.Channel) -> grpc.Call:
    """An ended call."""
    call = channel.unary_unary("/clip.v1.Clip/Info").future(b"", timeout=PATIENCE_SECONDS)
    call.exception()
    return call


def test_too_many_grpc_connections_of_one_address(strict: Server) -> None:
    with ExitStack() as stack:
        own = ("grpc.use_local_subchannel_pool", 1)  # a connection for each channel
        channels = [stack.enter_context(strict.channel([own])) for _ in range(MOST + 1)]
        with Client(strict.grpc) as client:
            assert len(client.encode(["a cat"])) == 1
            *admitted, refused = map(info, channels)
            assert {call.code() for call in admitted[:-1]} == {grpc.StatusCode.OK}
            for call in (admitted[-1], refused):  # the client has one of those that are admitted
                assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert OF_ADDRESS in call.details()
                said = dict(call.trailing_metadata())
                assert said["grpc-retry-pushback-ms"] == "1000"
                assert len(said["x-request-id"]) == 32
            health = health_pb2_grpc.HealthStub(channels[-1])
            assert health.Check(health_pb2.HealthCheckRequest()).status == 1
        with Client(strict.grpc, connect_timeout=0.2) as other:  # the place that became free
            assert len(other.encode(["a cat"])) == 1


@pytest.mark.slow
def test_too_many_connections_in_all(start: Start) -> None:
    spec = flow()
    spec["with"]["max_connections"] = 2
    server = start(spec)
    with Client(server.grpc) as first, Client(server.grpc) as second:
        assert len(first.encode(["a cat"])) == len(second.encode(["a cat"])) == 1
        third = Client(server.grpc, connect_timeout=0.5)
        with third, pytest.raises(ConnectionFailedError):
            third.encode(["a cat"])
    with Client(server.grpc) as client:
        assert len(client.encode(["a cat"])) == 1
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connect(server.websocket, proxy=None))
        for address in (server.http, server.websocket):
            with (
                Client(address, connect_timeout=0.5) as client,
                pytest.raises(ServerError, match=r"2 connections \(max_connections\)") as caught,
            ):
                client.encode(["a cat"])
            assert (caught.value.code, len(caught.value.request_id)) == ("UNAVAILABLE", 32)
    server.stop()


def test_old_connections_are_closed_between_requests(strict: Server) -> None:
    with requests.Session() as session, connect(strict.websocket, proxy=None) as link:
        session.headers["connection"] = "keep-alive"
        assert "connection" not in session.get(f"{strict.http}/livez").headers
        with pytest.raises(ConnectionClosed) as raised:
            link.recv(30)
        assert raised.value.rcvd is not None
        assert raised.value.rcvd.code == 1001
        time.sleep(0.3 * AGE)  # each reaches an age of its own, up to a tenth more or less
        # The connection may be the same: uvicorn keeps an idle one for five seconds.
        assert session.get(f"{strict.http}/livez").headers["connection"] == "close"


def test_the_client_loses_nothing_when_its_connection_is_closed(strict: Server) -> None:
    def encode_until_old(address: str) -> None:
        with Client(address) as client:
            expected = client.encode(["a cat"])
            end = time.monotonic() + 1.5 * AGE
            while time.monotonic() < end:
                found = client.encode(["a cat"] * 64, batch_size=4)
                np.testing.assert_allclose(found, np.repeat(expected, 64, 0), atol=1e-4)

    with ThreadPoolExecutor() as pool:
        list(pool.map(encode_until_old, strict.addresses))


@pytest.mark.parametrize("value", ["soon", -1, True])
def test_seconds_in_a_flow_are_checked(value: object) -> None:
    spec = flow()
    spec["with"]["max_connection_age"] = value
    with pytest.raises(ConfigurationError, match=r"max_connection_age: .* number of seconds"):
        prepare(spec)
