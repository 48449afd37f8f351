"""Streams and their envelopes by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from clip_client.envelope import MESSAGE_BYTES, serialize_messages
from clip_client.proto import clip_pb2 as pb
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
