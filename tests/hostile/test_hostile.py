"""More than 10,000 inputs that no client should send, over the three protocols: each is answered or
refused, nothing of the server's insides is told, others are answered meanwhile, and the server is
afterwards as it was before."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import psutil
import pytest
from conftest import ROOT, SAMPLES, Http, Server, Start, flow, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_bodies import PROTOBUF, odd_bodies
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from clip_client import Client
from clip_client.proto import clip_pb2 as pb

pytestmark = [
    pytest.mark.slow,
    # The neighbours draw random numbers meanwhile.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module"),
]

HTTP_BODIES, FRAMES, MESSAGES = 3_500, 4_000, 2_600
IDLE = 500
TIMEOUT = 2
# What the answers of a server must never hold.
INTERNALS = ("Traceback", 'File "', "site-packages", str(ROOT), " object at 0x")
REFUSED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
# What may be left of memory that was needed, in bytes.
MEMORY_SLACK = 120 << 20
MANY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclass
class Neighbour:
    """A well-behaved client beside the hostile ones; why it failed, if it did."""

    address: str
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with Client(self.address) as client:
            while not self.over.wait(0.2):
                try:
                    assert client.encode([f"a cat {self.answered}"], timeout=30).shape == (1, 256)
                    self.answered += 1
                except Exception as error:
                    self.failures.append(str(error))


@pytest.fixture(scope="module")
def server(start: Start) -> Iterator[Server]:
    """A server with neighbours on every protocol, which must be well until the end."""
    spec = flow(max_pixels=4_000_000)
    spec["with"] |= {"header_timeout": TIMEOUT, "body_timeout": TIMEOUT}
    server = start(spec)
    warm_up(server)
    before = State.of(server)
    neighbours = [Neighbour(address) for address in server.addresses]
    threads = [threading.Thread(target=each.run) for each in neighbours]
    for thread in threads:
        thread.start()
    yield server
    for each in neighbours:
        each.over.set()
    for thread in threads:
        thread.join()
    assert [each.failures for each in neighbours] == [[], [], []]
    assert all(each.answered for each in neighbours)
    before.assert_restored(server)
    assert "Traceback" not in server.output()
    server.stop()


@dataclass
class State:
    """The processes of a server, and what they hold."""

    processes: list[int]
    memory: int
    descriptors: int

    @classmethod
    def of(cls, server: Server) -> State:
        family = server.family()
        memory = sum(each.memory_info().rss for each in family)
        return cls([each.pid for each in family], memory, sum(each.num_fds() for each in family))

    def assert_restored(self, server: Server) -> None:
        deadline = time.monotonic() + 30
        while True:
            now = State.of(server)
            assert now.processes == self.processes
            fits = now.descriptors <= self.descriptors + 10
            if fits and now.memory <= self.memory + MEMORY_SLACK:
                return
            assert time.monotonic() < deadline, (self, now)
            time.sleep(0.5)


def warm_up(server: Server) -> None:
    """Sends what is good, so that all that is needed once is in memory."""
    for address in server.addresses:
        with Client(address) as client:
            client.encode(["a cat", SAMPLES / "cat.png"] * 200)
    assert psutil.pid_exists(server.process.pid)


def assert_tells_nothing(answer: str) -> None:
    found = [each for each in INTERNALS if each in answer]
    assert not found, answer[:500]


def test_http_bodies(server: Server) -> None:
    with Http(server.http) as http:
        for body in odd_bodies(7, count=HTTP_BODIES):
            headers = {"content-type": body.content_type}
            answer = http.post(body.route, data=body.content, headers=headers)
            assert answer.status_code in (200, 400, 404, 405, 413), (body, answer.text)
            assert_tells_nothing(answer.text)


items = (
    st.builds(
        pb.Item,
        text=st.text(max_size=50),
        id=st.text(max_size=5),
        source=st.text(max_size=5),
    )
    | st.builds(pb.Item, image=st.binary(max_size=50))
    | st.builds(pb.Item, uri=st.text(max_size=20))
)
encodes = st.builds(
    pb.EncodeRequest,
    items=st.lists(items, max_size=3),
    options=st.builds(pb.Options, minibatch_size=st.integers(0, 2**32 - 1)),
    model=st.sampled_from(["", "", "clip", "nothing", "(a+)+$", "x" * 3000]),
)
ranks = st.builds(pb.RankRequest, query=items, candidates=st.lists(items, max_size=3))
searches = st.builds(
    pb.SearchRequest, queries=st.lists(items, max_size=2), limit=st.integers(0, 2**32 - 1)
)
requests_in = (
    st.builds(
        pb.Request, id=st.integers(0, 2**64 - 1), encode=encodes, timeout=st.integers(0, 2**32 - 1)
    )
    | st.builds(pb.Request, rank=ranks)
    | st.builds(pb.Request, search=searches)
)


@st.composite
def mutated(draw: st.DrawFn, messages: st.SearchStrategy[bytes]) -> bytes:
    """Messages in which some bytes are others."""
    content = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 2)) if content else 0):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


frames = mutated(
    st.builds(lambda each: pb.Requests(requests=[each]).SerializeToString(), requests_in)
)


class Link:
    """A WebSocket that is opened again if the server closes it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = self._open()

    def _open(self) -> ClientConnection:
        return connect(self.address, proxy=None, compression=None, max_size=None).__enter__()

    def ask(self, frame: bytes) -> bytes:
        """The answer to a frame, and to one more that shows that the connection is alive."""
        try:
            self.socket.send(frame)
            probe = pb.Request(id=2**63, info=pb.InfoRequest())
            self.socket.send(pb.Requests(requests=[probe]).SerializeToString())
            answers = b""
            while True:
                answer = self.socket.recv(60)
                assert isinstance(answer, bytes)
                answers += answer
                if any(each.HasField("info") for each in pb.Responses.FromString(answer).responses):
                    return answers
        except ConnectionClosed as error:
            self.socket = self._open()
            return str(error).encode()


def test_websocket_frames(server: Server) -> None:
    link = Link(server.websocket)

    @settings(MANY, max_examples=FRAMES)
    @given(frames | st.binary(max_size=200))
    def send(frame: bytes) -> None:
        assert_tells_nothing(link.ask(frame).decode(errors="replace"))

    send()
    link.socket.close()


def test_grpc_messages(server: Server) -> None:
    messages = {
        "Encode": mutated(encodes.map(pb.EncodeRequest.SerializeToString)),
        "Rank": mutated(ranks.map(pb.RankRequest.SerializeToString)),
        "Search": mutated(searches.map(pb.SearchRequest.SerializeToString)),
        "Info": st.binary(max_size=50),
    }
    with server.channel() as channel:
        for method, strategy in messages.items():
            call = channel.unary_unary(f"/clip.v1.Clip/{method}")
            send_all(call, strategy, MESSAGES // len(messages))


def send_all(call: Any, strategy: st.SearchStrategy[bytes], count: int) -> None:
    """Sends messages to a method of gRPC, which answers or refuses them."""

    @settings(MANY, max_examples=count)
    @given(strategy)
    def send(message: bytes) -> None:
        error = call.future(message, timeout=60).exception()
        if error is not None:
            assert error.code() in REFUSED, error
            assert_tells_nothing(str(error.details()))

    send()


def lying_images() -> Iterator[bytes]:
    """Images that are not what they say, or far more."""
    png, jpeg, gif = (
        saved(Image.new("RGB", (64, 64), "red"), form) for form in ("PNG", "JPEG", "GIF")
    )
    webp = saved(Image.new("RGB", (64, 64), "red"), "WEBP")
    yield saved(Image.new("1", (3_000, 3_000)), "PNG")  # too many pixels
    for width, height in ((2**31 - 1, 2**31 - 1), (0, 0), (1, 2**30), (60_000, 60_000)):
        head = png[:16] + struct.pack(">II", width, height) + png[24:29]
        yield head + struct.pack(">I", zlib.crc32(head[12:])) + png[33:]
    for image in (png, jpeg, gif, webp):
        yield from (image[:size] for size in (1, 10, len(image) // 2, len(image) - 1))
        yield image + b"<script>alert(1)</script>" + gzip.compress(bytes(10 << 20))
        yield b"%PDF-1.4\n" + image
        yield gzip.compress(image)
    bomb = zlib.compress(bytes(50 << 20))
    text = b"zTXt" + b"Comment\0\0" + bomb
    yield png[:33] + struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    yield b"GIF89a" + b"\xff" * 5_000
    yield b"RIFF" + b"\xff\xff\xff\xff" + b"WEBPVP8 " + bytes(100)
    yield b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield b"\0\0\0\x1cftypheic" + bytes(200)
    yield b"II*\0" + b"\xff" * 200


ODD_TEXTS = [
    "\0", "\u202e\u2066 tac a", "a" + "\u0301" * 50_000, "\U0010ffff" * 1000, "\ufeff", "\x1b[2J",
    "&#" + "9" * 10_000 + ";", "&lt;" * 10_000, "<|startoftext|>" * 1000, "ﷺ" * 10_000,
    "a " * 1_000_000, "(" * 100_000, "data:," + "%" * 10_000, "\r\n" * 100_000, "\ud7ff\ue000",
]  # fmt: skip


def test_images_and_texts(server: Server) -> None:
    contents: list[str | bytes] = [*lying_images(), *ODD_TEXTS]
    for address in server.addresses:
        with Client(address) as client:
            _, errors = client.encode([*contents, "a cat"], on_item_error="return", batch_size=4)
        assert len(contents) not in [error.index for error in errors]
        for error in errors:
            assert_tells_nothing(error.message)


def test_parameters_and_nesting(server: Server) -> None:
    numbers = [float("nan"), float("inf"), 1e308, -1e308, 2**63, -(2**63), 10**400, -0.0]
    with Http(server.http) as http:
        for name in ("minibatch_size", "normalize", "limit", "unknown"):
            for number in numbers:
                body = json.dumps({"data": ["a"], "parameters": {name: number}})
                answer = http.post("/encode", data=body)
                assert answer.status_code in (200, 400), answer.text
                assert_tells_nothing(answer.text)
        for depth in (100, 1_000, 100_000):
            for opened, closed in (("[", "]"), ('{"a":', "}"), ('[{"chunks":', "}]")):
                nested = opened * depth + "1" + closed * depth
                for body in (nested, f'{{"data": {nested}}}', f'{{"parameters": {nested}}}'):
                    answer = http.post("/encode", data=body)
                    assert answer.status_code in (200, 400), answer.text
                    assert_tells_nothing(answer.text)
        deep = b""
        for _ in range(500):  # a group inside a group
            deep = b"\x0a" + _length(len(deep)) + deep
        answer = http.post("/encode", data=deep, headers={"content-type": PROTOBUF})
        assert answer.status_code in (200, 400)
        zipped = gzip.compress(b'{"data": ["' + b"a" * (300 << 20) + b'"]}')
        headers = {"content-encoding": "gzip", "content-type": "application/json"}
        answer = http.post("/encode", data=zipped, headers=headers)
        assert answer.status_code in (400, 413, 415), answer.text
        assert_tells_nothing(answer.text)
        image = base64.b64encode(bytes(33 << 20)).decode()
        answer = http.post("/encode", json={"data": [{"blob": image}, {"text": "a cat"}]})
        assert "error" in answer.json()["data"][0]
        assert "embedding" in answer.json()["data"][1]


def _length(count: int) -> bytes:
    """A length as protobuf writes it."""
    low, rest = count & 127, count >> 7
    return bytes([low | 128]) + _length(rest) if rest else bytes([low])


def http2(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    head = struct.pack(">I", len(payload))[1:] + bytes([kind, flags])
    return head + struct.pack(">I", stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """A header as HPACK has it, of up to 126 bytes."""
    return b"\0" + b"".join(bytes([len(each)]) + each for each in (name, value))


DATA, HEADERS, RESET, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + http2(SETTINGS)
CALL = b"".join(
    header(*each)
    for each in (
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/clip.v1.Clip/Encode")),
        *((b":authority", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers")),
    )
)
MESSAGE = b"\0\0\0\0\x09" + pb.EncodeRequest(items=[pb.Item(text="a cat")]).SerializeToString()
# After the headers of a call: its frames with a message.
ODD_CALLS = [
    (header(b"x-request-id", b"\xff\n"), http2(DATA, END_STREAM, 1, MESSAGE)),
    (header(b"grpc-encoding", b"bogus"), http2(DATA, END_STREAM, 1, b"\1" + MESSAGE[1:])),
    (header(b"grpc-timeout", b"-1S"), http2(DATA, END_STREAM, 1, MESSAGE)),
    (header(b"authorization-bin", b"!!!!"), http2(DATA, END_STREAM, 1, MESSAGE)),
    (b"", http2(DATA, END_STREAM, 1, b"\7" + MESSAGE[1:])),
    (b"", http2(DATA, END_STREAM, 1, b"\0\xff\xff\xff\xff")),
    (b"", http2(DATA, END_STREAM, 1, MESSAGE * 3)),
    (b"", http2(DATA, END_STREAM, 1)),
    (b"", http2(HEADERS, END_STREAM | END_HEADERS, 1, header(b"x", b"y"))),
    (b"", http2(WINDOW, 0, 0, b"\x7f\xff\xff\xff") * 3),
    (b"", http2(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff")),
    (b"\xff" * 20, b""),
]
FLOODS = {
    "ping": http2(PING, 0, 0, bytes(8)) * 4_000,
    "settings": http2(SETTINGS) * 4_000,
    "window": http2(WINDOW, 0, 0, b"\0\0\0\1") * 4_000,
    "data": http2(HEADERS, END_HEADERS, 1, CALL) + http2(DATA, 0, 1) * 4_000,
    "continuation": http2(HEADERS, 0, 1, CALL)
    + http2(CONTINUATION, 0, 1, header(b"a", b"b")) * 9_000,
    "resets": b"".join(
        http2(HEADERS, END_HEADERS, stream, CALL)
        + http2(DATA, 0, stream, MESSAGE)
        + http2(RESET, 0, stream, b"\0\0\0\x08")
        for stream in range(1, 20_001, 2)
    ),
    "streams": b"".join(
        http2(HEADERS, END_HEADERS, stream, CALL) for stream in range(1, 20_001, 2)
    ),
}


def test_http2_frames(server: Server) -> None:
    for headers, frames in ODD_CALLS:
        with socket.create_connection(("127.0.0.1", server.ports[0]), 30) as link:
            link.sendall(HTTP2 + http2(HEADERS, END_HEADERS, 1, CALL + headers) + frames)
            link.settimeout(0.3)
            with suppress(OSError):
                while part := link.recv(10_000):
                    assert_tells_nothing(part.decode(errors="replace"))


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_of_http2_frames(server: Server, kind: str) -> None:
    """Of a client that reads no answer."""
    with socket.create_connection(("127.0.0.1", server.ports[0]), 1) as link:
        with suppress(OSError):
            link.sendall(HTTP2)
            for _ in range(1 if kind in ("resets", "streams") else 50):
                link.sendall(FLOODS[kind])
        with Client(server.grpc) as client:
            assert client.encode(["a cat"], timeout=30).shape == (1, 256)


STARTS = [
    b"", b"G", b"GET /livez HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\0",
    b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{",
    b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
    b"POST /encode HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
]  # fmt: skip


def test_slow_and_half_closed_connections(server: Server) -> None:
    with ExitStack() as stack:
        links = []
        for port in server.ports:
            for start in STARTS:
                for is_half_closed in (False, True):
                    link = socket.create_connection(("127.0.0.1", port), 30)
                    stack.enter_context(link)
                    with suppress(OSError):
                        link.sendall(start)
                        if is_half_closed:
                            link.shutdown(socket.SHUT_WR)
                    links.append(link)
        for link in links:
            answer = b""
            with suppress(OSError):  # a reset ends it as well
                answer = b"".join(iter(lambda link=link: link.recv(10_000), b""))  # type: ignore[misc]
            assert_tells_nothing(answer.decode(errors="replace"))


def test_idle_connections(server: Server) -> None:
    with ExitStack() as stack, Http(server.http) as http:
        for number in range(IDLE):
            port = server.ports[number % 3]
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
        assert http.get("/readyz").status_code == 200
        assert "embedding" in http.post("/encode", json={"data": ["a cat"]}).json()["data"][0]
