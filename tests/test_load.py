"""A server that has more to do than it can: what it refuses, gives up, drops and counts."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from conftest import SLOW_EXECUTOR, Http, Server, Start, eventually, flow
from websockets.sync.client import connect

from clip_client import Client
from clip_client.errors import DeadlineExceededError
from clip_client.proto import clip_pb2 as pb

BATCH, SECONDS = 4, 0.05  # of the slow executor
FULL, FULL_BYTES = 200, 100_000  # items, and bytes in the gateway
MOST_BEGUN = 80  # of 160, which take 2 s, where they are given up early
BURST = 80  # requests

_numbers = itertools.count()


@pytest.fixture(scope="module")
def slow(start: Start) -> Server:
    spec = flow(
        module=SLOW_EXECUTOR, minibatch_size=BATCH, max_queued_items=FULL, cache_bytes=1 << 20
    )
    # As many items as fit, however long they wait.
    spec["with"] |= {"max_wait": 0, "max_queued_bytes": FULL_BYTES}
    return start(spec)


@pytest.fixture(scope="module")
def fresh(start: Start) -> Iterator[Server]:
    """A slow server that promises a short wait."""
    spec = flow(module=SLOW_EXECUTOR, minibatch_size=BATCH)
    spec["with"]["max_wait"] = 0.5
    server = start(spec)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def first_burst(fresh: Server) -> list[pb.Response]:
    """The responses to the first requests, which come all at once and take 8 s."""
    requests = [
        pb.Request(id=number, encode=pb.EncodeRequest.FromString(protobuf(2 * BATCH)))
        for number in range(1, BURST + 1)
    ]
    found: list[pb.Response] = []
    with connect(fresh.websocket, proxy=None) as link:
        link.send(pb.Requests(requests=requests).SerializeToString())
        while len(found) < BURST:
            message = link.recv(30)
            assert isinstance(message, bytes)
            found += pb.Responses.FromString(message).responses
    return found


@pytest.fixture(scope="module")
def prompt(fresh: Server, first_burst: list[pb.Response]) -> Server:
    """The server that promises a short wait, whose rate is known."""
    assert first_burst
    return fresh


def texts(count: int) -> list[str]:
    """Texts that no one has sent before."""
    return [f"text {next(_numbers)}" for _ in range(count)]


def is_idle(server: Server) -> bool:
    return server.metrics()["in_flight_items"] == 0


def protobuf(count: int) -> bytes:
    items = [pb.Item(text=text) for text in texts(count)]
    return pb.EncodeRequest(items=items).SerializeToString()


def test_a_full_server_refuses_and_says_when_to_try_again(slow: Server) -> None:
    with ThreadPoolExecutor() as pool, Http(slow.http) as http:
        first = pool.submit(
            http.post, "/encode", json={"data": [{"text": text} for text in texts(FULL - 20)]}
        )
        assert eventually(lambda: slow.metrics()["in_flight_items"] > 0)
        refused = http.post("/encode", json={"data": [{"text": text} for text in texts(50)]})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert "try again" in refused.json()["error"]["message"]
        # What still fits is taken.
        assert http.post("/encode", json={"data": texts(2)}).status_code == 200
        with slow.channel() as channel:
            encode = channel.unary_unary("/clip.v1.Clip/Encode")
            with pytest.raises(grpc.RpcError) as raised:
                encode(protobuf(50))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(raised.value.trailing_metadata())["grpc-retry-pushback-ms"] == "1000"
        assert first.result().status_code == 200
        assert slow.metrics()["refused_requests"] == 2


def test_the_client_comes_again(slow: Server) -> None:
    refused = slow.metrics()["refused_requests"]
    clients = [Client(address) for address in slow.addresses]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(clients[0].encode, texts(FULL - 20), batch_size=FULL)
        assert eventually(lambda: slow.metrics()["in_flight_items"] > 0)
        calls = [pool.submit(each.encode, texts(30), batch_size=FULL) for each in clients]
        assert all(np.isfinite(call.result()).all() for call in (first, *calls))
    for client in clients:
        client.close()
    assert slow.metrics()["refused_requests"] >= refused + len(clients)


@pytest.mark.parametrize("protocol", ["grpc", "websocket"])
def test_what_is_too_late_is_given_up(slow: Server, protocol: str) -> None:
    before = slow.metrics()
    with Client(getattr(slow, protocol)) as client, pytest.raises(DeadlineExceededError):
        client.encode(texts(160), batch_size=160, timeout=0.3)
    assert eventually(lambda: is_idle(slow))
    assert slow.metrics()["texts"] - before["texts"] < MOST_BEGUN
    ended = ("expired_requests", "cancelled_requests")
    assert eventually(lambda: sum(slow.metrics()[each] - before[each] for each in ended) == 1)


def test_a_grpc_deadline_goes_along(slow: Server) -> None:
    before = slow.metrics()["texts"]
    with slow.channel() as channel:
        encode = channel.unary_unary("/clip.v1.Clip/Encode")
        with pytest.raises(grpc.RpcError) as raised:
            encode(protobuf(160), timeout=0.3)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert eventually(lambda: is_idle(slow))
    assert slow.metrics()["texts"] - before < MOST_BEGUN


@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_what_a_client_gives_up_is_dropped(slow: Server, protocol: str) -> None:
    async def main() -> None:
        client = Client(getattr(slow, protocol))
        task = asyncio.create_task(client.aencode(texts(160), batch_size=160))
        while is_idle(slow):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert eventually(lambda: is_idle(slow))
        # The connection serves on.
        assert (await client.aencode(["next"])).shape == (1, 256)

    before = slow.metrics()
    asyncio.run(main())
    cancelled = before["cancelled_requests"] + 1
    assert eventually(lambda: slow.metrics()["cancelled_requests"] == cancelled)
    assert slow.metrics()["texts"] - before["texts"] < MOST_BEGUN


def test_a_client_that_vanishes_leaves_no_work_behind(slow: Server) -> None:
    before = slow.metrics()["texts"]
    with connect(slow.websocket, proxy=None) as link:
        request = pb.Request(id=1, encode=pb.EncodeRequest.FromString(protobuf(160)))
        link.send(pb.Requests(requests=[request]).SerializeToString())
        assert eventually(lambda: not is_idle(slow))
    assert eventually(lambda: is_idle(slow))
    assert slow.metrics()["texts"] - before < MOST_BEGUN


def test_many_requests_in_one_message(slow: Server) -> None:
    """Each has its own answer; the one that is cancelled has none."""
    with connect(slow.websocket, proxy=None) as link:
        requests = [
            pb.Request(id=number, encode=pb.EncodeRequest.FromString(protobuf(number)))
            for number in range(1, 9)
        ]
        requests.append(pb.Request(id=8, cancel=pb.Cancel()))
        requests.append(pb.Request(id=9, info=pb.InfoRequest()))
        requests.append(pb.Request(id=10))
        link.send(pb.Requests(requests=requests).SerializeToString())
        answers: dict[int, pb.Response] = {}
        while len(answers) < 9:
            message = link.recv(30)
            assert isinstance(message, bytes)
            answers |= {each.id: each for each in pb.Responses.FromString(message).responses}
    assert sorted(answers) == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert all(answers[number].encode.count == number for number in range(1, 8))
    assert answers[9].info.runtime == "slow"
    assert answers[10].error.code == pb.Error.INVALID_ARGUMENT


def test_an_interactive_request_passes_a_bulk_one(slow: Server) -> None:
    with Client(slow.grpc) as client, ThreadPoolExecutor() as pool:
        bulk_started = time.monotonic()
        bulk = pool.submit(client.encode, texts(180), batch_size=60)
        assert eventually(lambda: not is_idle(slow))
        started = time.monotonic()
        client.encode(texts(1))
        waited = time.monotonic() - started
        assert not bulk.done()
        assert np.isfinite(bulk.result()).all()
        # Of 46 batches: what is in flight, perhaps one of the oldest's, its own; and some slack.
        assert waited < (time.monotonic() - bulk_started) / 2


def test_cache_and_duplicates_show_in_metrics(slow: Server) -> None:
    before = slow.metrics()
    with Client(slow.grpc) as client:
        client.encode(["one", "two", "two"])
        client.encode(["one", "two", "three"])
    counted = {"cache_hits": 2, "cache_misses": 4, "deduplicated_items": 1, "texts": 3}
    found = slow.metrics()
    assert {name: found[name] - before[name] for name in counted} == counted
    assert found["cache_bytes"] > 0


def assert_refused(server: Server, protocol: str, count: int) -> None:
    """The server refuses some texts, and says when to send them again."""
    if protocol == "http":
        with Http(server.http) as http:
            answer = http.post("/encode", json={"data": texts(count)})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        message = answer.json()["error"]["message"]
    elif protocol == "grpc":
        with server.channel() as channel:
            with pytest.raises(grpc.RpcError) as raised:
                channel.unary_unary("/clip.v1.Clip/Encode")(protobuf(count))
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            message = raised.value.details()
    else:
        with connect(server.websocket, proxy=None) as link:
            request = pb.Request(id=1, encode=pb.EncodeRequest.FromString(protobuf(count)))
            link.send(pb.Requests(requests=[request]).SerializeToString())
            answered = link.recv(30)
            assert isinstance(answered, bytes)
            (response,) = pb.Responses.FromString(answered).responses
        assert response.error.code == pb.Error.RESOURCE_EXHAUSTED
        assert response.error.retry_after > 0
        message = response.error.message
    assert "would wait" in message
    assert "max_wait" in message


def test_the_first_burst_is_admitted_as_far_as_it_need_not_wait(
    first_burst: list[pb.Response],
) -> None:
    """Before the server knows how fast it is."""
    refused = [each.error for each in first_burst if each.HasField("error")]
    assert 0 < BURST - len(refused) < BURST / 4
    assert {each.code for each in refused} == {pb.Error.RESOURCE_EXHAUSTED}
    assert all("max_wait" in each.message and each.retry_after > 0 for each in refused)


def test_what_would_wait_too_long_is_refused_and_the_server_stays_ready(prompt: Server) -> None:
    with Client(prompt.grpc) as client, ThreadPoolExecutor() as pool, Http(prompt.http) as http:
        # Takes 3 s: more than max_wait, which an idle server does not mind.
        bulk = pool.submit(client.encode, texts(240), batch_size=240)
        assert eventually(lambda: not is_idle(prompt))
        for protocol in ("grpc", "http", "websocket"):
            assert_refused(prompt, protocol, 200)
        # A small request passes the large one, so it does not wait.
        assert http.post("/encode", json={"data": texts(1)}).status_code == 200
        assert http.get("/readyz").status_code == 200
        assert not bulk.done()
        assert np.isfinite(bulk.result()).all()


def test_the_client_comes_again_until_it_is_its_turn(prompt: Server) -> None:
    clients = [Client(address) for address in prompt.addresses]
    with ThreadPoolExecutor() as pool:
        calls = [pool.submit(each.encode, texts(64), batch_size=16) for each in clients]
        assert all(np.isfinite(call.result()).all() for call in calls)
    for client in clients:
        client.close()


def test_a_few_large_requests_wait_for_each_other(prompt: Server) -> None:
    """Together they take 1 s, twice as long as max_wait; no client has to send one again."""
    before = prompt.metrics()["refused_requests"]
    with Client(prompt.grpc) as client:
        assert np.isfinite(client.encode(texts(80), batch_size=16)).all()
    assert prompt.metrics()["refused_requests"] == before


def test_a_request_that_would_be_refused_is_not_read(prompt: Server) -> None:
    body = json.dumps({"data": texts(130)}).encode()
    head = b"POST /encode HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    with Client(prompt.grpc) as client, ThreadPoolExecutor() as pool, Http(prompt.http) as http:
        assert http.post("/encode", data=body).status_code == 200
        bulk = pool.submit(client.encode, texts(250), batch_size=250)
        assert eventually(lambda: not is_idle(prompt))
        with socket.create_connection(("127.0.0.1", prompt.ports[1]), 10) as connection:
            connection.sendall(head)  # and no body
            assert b" 429 " in connection.recv(1000)
        assert np.isfinite(bulk.result()).all()


def test_a_gateway_that_holds_too_many_bytes_refuses(slow: Server) -> None:
    with ThreadPoolExecutor() as pool, Http(slow.http) as http:
        large = {"data": [{"text": text + " word" * 300} for text in texts(100)]}
        # An idle server takes it.
        first = pool.submit(http.post, "/encode", json=large)
        assert eventually(lambda: not is_idle(slow))
        refused = http.post("/encode", json=large)
        assert refused.status_code == 429
        assert "MiB" in refused.json()["error"]["message"]
        assert first.result().status_code == 200
