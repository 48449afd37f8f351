"""Streams and their envelopes by themselves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from clip_client.envelope import MESSAGE_BYTES, serialize_messages
from clip_client.proto import clip_pb2 as pb
from clip_client.transports.multiplex import Multiplexer
from clip_server.engine.service import Service
from clip_server.errors import RequestError
from clip_server.gateway.replicas import ReplicaPool
from clip_server.launch.process_setup import return_freed_memory
from clip_server.rpc.multiplexing import StreamServer


@pytest.mark.parametrize("length", [0, 1, 100, 127, 128, 129, 16_384, 300_000])
def test_an_envelope_is_what_protobuf_writes(length: int) -> None:
    requests = [
        pb.Request(id=number, encode=pb.EncodeRequest(items=[pb.Item(image=bytes(length))]))
        for number in range(3)
    ]
    expected = pb.Requests(requests=requests)
    assert serialize_messages(iter(requests)) == expected.SerializeToString()


def test_an_envelope_is_closed_when_it_is_large() -> None:
    half = pb.Request(encode=pb.EncodeRequest(items=[pb.Item(image=bytes(MESSAGE_BYTES // 2))]))
    waiting = iter([half] * 5)
    sizes = [len(pb.Requests.FromString(serialize_messages(waiting)).requests) for _ in range(3)]
    assert sizes == [2, 2, 1]


def many_requests(count: int) -> bytes:
    requests = [pb.Request(info=pb.InfoRequest()) for _ in range(count)]
    return pb.Requests(requests=requests).SerializeToString()


def test_requests_that_came_before_the_end_are_answered() -> None:
    """Also those of a message that was being read then."""
    answered: list[pb.Response] = []

    async def call(request: pb.Request) -> pb.Response:
        streams.drain()
        return pb.Response(id=request.id)

    async def send(message: bytes) -> None:
        answered.extend(pb.Responses.FromString(message).responses)

    async def messages() -> AsyncIterator[bytes]:
        items = [pb.Item(text="a")] * 1000
        requests = [
            pb.Request(id=number, encode=pb.EncodeRequest(items=items)) for number in range(1, 9)
        ]
        yield pb.Requests(requests=requests).SerializeToString()
        await asyncio.Event().wait()

    streams = StreamServer(call, max_in_flight=100)
    asyncio.run(asyncio.wait_for(streams.serve(messages(), send), 10))
    assert sorted(each.id for each in answered) == [*range(1, 9)]


@pytest.mark.parametrize(
    ("message", "dim", "most_taken"),
    [
        (b"", 1, 102),
        (b"nonsense", 1, 102),
        (many_requests(10), 1, 12),
        (many_requests(10), 1 << 20, 6),
        (many_requests(5_000), 1, 1),
    ],
    ids=["empty", "nonsense", "small", "large", "many"],
)
def test_a_client_that_reads_nothing_is_not_read(message: bytes, dim: int, most_taken: int) -> None:
    """Its requests wait where they are; their responses would fill the memory."""
    taken = running = most_running = 0

    async def call(request: pb.Request) -> pb.Response:
        nonlocal running, most_running
        running += 1
        most_running = max(running, most_running)
        await asyncio.sleep(0)
        running -= 1
        return pb.Response(id=request.id, encode=pb.EncodeResponse(count=1, dim=dim))

    async def messages() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 1_000:
            taken += 1
            yield message
            await asyncio.sleep(0)

    async def send(_: bytes) -> None:
        await asyncio.Event().wait()

    async def serve() -> None:
        serving = asyncio.create_task(StreamServer(call, max_in_flight=100).serve(messages(), send))
        before = -1
        while taken != before:
            before = taken
            await asyncio.sleep(0.1)
        serving.cancel()

    asyncio.run(serve())
    assert taken <= most_taken
    assert most_running <= 100


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_images_in_flight_are_in_memory_once() -> None:
    """Neither the message that they came in nor the request is kept while they are encoded."""
    sizes: list[int] = []
    image = bytes(range(256)) * (4 << 10)

    class Held:
        async def encode(self, items: list[Any], **_: Any) -> None:
            assert set(items) == {image}
            await asyncio.sleep(0.1)  # all have come
            return_freed_memory()
            sizes.append(anonymous_bytes())
            raise RequestError("held")

    async def messages() -> AsyncIterator[bytes]:
        for number in range(1, 5):
            request = pb.Request(
                id=number, encode=pb.EncodeRequest(items=[pb.Item(image=image)] * 8)
            )
            yield pb.Requests(requests=[request]).SerializeToString()
            del request
        await asyncio.sleep(0.2)

    async def send(_: bytes) -> None:
        pass

    streams = StreamServer(Service(cast(Any, Held())).handle, max_in_flight=100)
    return_freed_memory()
    before = anonymous_bytes()
    asyncio.run(asyncio.wait_for(streams.serve(messages(), send), 10))
    assert len(sizes) == 4
    # The images are once in memory; with their messages it would be twice.
    assert sizes[0] - before < 1.5 * 4 * 8 * len(image)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_request_is_released_once_no_other_replica_may_answer_it(
    replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its images are then in memory in the encoder alone."""

    class SilentLink:
        def __init__(self) -> None:
            self.written = asyncio.Event()

        async def write(self, _: bytes) -> None:
            self.written.set()

        async def read(self) -> pb.Responses:
            await asyncio.Event().wait()
            raise AssertionError

        async def close(self) -> None: ...

    async def references_while_it_is_in_flight() -> int:
        link = SilentLink()

        async def open_link() -> SilentLink:
            return link

        monkeypatch.setattr(
            "clip_server.gateway.replicas.open_transport", lambda *_: Multiplexer(open_link)
        )
        pool = ReplicaPool("clip", [f"127.0.0.1:{port}" for port in range(1, 1 + replicas)], None)
        request = pb.Request(encode=pb.EncodeRequest(items=[pb.Item(text="a cat")]))
        before = sys.getrefcount(request)
        sending = asyncio.create_task(pool.send(request))
        await link.written.wait()
        await asyncio.sleep(0)
        kept = sys.getrefcount(request) - before
        sending.cancel()
        await asyncio.wait([sending])
        await pool.close()
        return kept

    kept = asyncio.run(references_while_it_is_in_flight())
    assert (kept == 0) is (replicas == 1)
