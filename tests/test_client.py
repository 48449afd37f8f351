"""The Client against a server in this process, over each transport."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import eventually
from fake_server import DIM, SCHEMES, FakeServer, vector

import clip_client
from clip_client import (
    AuthenticationError,
    Batch,
    Client,
    ClientClosedError,
    ClipError,
    ClipWarning,
    ConnectionFailedError,
    DeadlineExceededError,
    InvalidInputError,
    ItemFailure,
    ItemsError,
    OverloadedError,
    ServerError,
    TruncationWarning,
)
from clip_client.pipeline import MESSAGE_BYTES, READ_AHEAD


@pytest.fixture(params=SCHEMES)
def server(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with FakeServer(request.param) as fake:
        yield fake


@pytest.fixture
def grpc_server() -> Iterator[FakeServer]:
    with FakeServer("grpc") as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address, connect_timeout=0.2) as one:
        yield one


@pytest.fixture
def grpc_client(grpc_server: FakeServer) -> Iterator[Client]:
    with Client(grpc_server.address) as one:
        yield one


def vectors(contents: Any) -> np.ndarray[Any, Any]:
    return np.array([vector(content) for content in contents], np.float32)


TEXTS = [f"text {number}" for number in range(300)]


def test_encode_keeps_the_order(server: FakeServer, client: Client) -> None:
    server.shuffle, server.delay = True, 0.01
    result = client.encode(TEXTS, batch_size=7)
    assert result.dtype == np.float32
    assert result.flags.writeable
    assert np.array_equal(result, vectors(TEXTS))
    assert max(len(request.items) for request in server.requests) == 7
    assert server.most_in_flight > 1
    assert server.connections <= 8


def test_batches_by_default(grpc_server: FakeServer, grpc_client: Client) -> None:
    grpc_client.encode(TEXTS)
    assert sorted(len(request.items) for request in grpc_server.requests) == [44, 128, 128]
    grpc_server.requests.clear()
    grpc_client.encode([b"JPEG"] * 70)
    assert sorted(len(request.items) for request in grpc_server.requests) == [6, 32, 32]


def test_large_messages_are_split(server: FakeServer, client: Client) -> None:
    pictures = [bytes([number]) * 800_000 for number in range(10)]
    pictures.insert(4, b"huge" * 2_000_000)
    assert np.array_equal(client.encode(pictures, batch_size=64), vectors(pictures))
    sizes = [[len(item.image) for item in request.items] for request in server.requests]
    assert all(sum(request) <= MESSAGE_BYTES or len(request) == 1 for request in sizes)
    assert [8_000_000] in sizes
    assert max(len(request) for request in sizes) == 3


def test_a_generator_is_read_as_far_as_needed(
    grpc_server: FakeServer, grpc_client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(b"PNG")
    pulled = 0

    def paths() -> Iterator[Path]:
        nonlocal pulled
        for _ in range(1000):
            pulled += 1
            yield path

    grpc_server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(grpc_client.encode, paths(), batch_size=2, prefetch=3)
        assert eventually(lambda: grpc_server.most_in_flight == 3)
        time.sleep(0.2)  # for one too many to show
        # Those on their way, those in the next request, and those being read.
        assert 0 < pulled <= 3 * 2 + 2 + READ_AHEAD + 1
        grpc_server.gate.set()
        assert done.result().shape == (1000, DIM)
    assert grpc_server.most_in_flight <= 3


def test_answers_arrive_while_the_generator_waits(grpc_client: Client) -> None:
    seen: list[int] = []

    def slow() -> Iterator[str]:
        for text in TEXTS[:6]:
            time.sleep(0.05)
            yield text
        assert len(seen) >= 3

    grpc_client.encode(slow(), batch_size=1, on_done=lambda batch: seen.extend(batch.indices))
    assert seen == list(range(6))


def test_a_generator_runs_in_the_callers_thread(grpc_client: Client) -> None:
    threads = set()

    def texts() -> Iterator[str]:
        threads.add(threading.current_thread())
        yield "a"

    grpc_client.encode(texts(), on_always=lambda _: threads.add(threading.current_thread()))
    assert threads == {threading.current_thread()}


def test_an_error_of_the_generator_is_raised(grpc_client: Client) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        grpc_client.encode(texts(), batch_size=10)
    assert grpc_client.encode(["a"]).shape == (1, DIM)


@pytest.mark.parametrize("empty", [[], (), iter(()), np.array([])])
def test_nothing_gives_nothing(grpc_client: Client, empty: Any) -> None:
    result = grpc_client.encode(empty)
    assert result.shape == (0, DIM)
    assert result.dtype == np.float32


@pytest.mark.parametrize(
    "single",
    [
        "a cat",
        b"JPEG",
        Path("cat.png"),
        {"text": "a"},
        np.zeros((5, 5, 3), np.uint8),
        3,
        None,
        SimpleNamespace(text="a", embedding=None),
    ],
)
def test_one_item_is_told_to_be_a_list(single: Any) -> None:
    with pytest.raises(TypeError, match=r"pass several items, not one .*: encode\(\["):
        Client("grpc://127.0.0.1:1").encode(single)
    with pytest.raises(TypeError, match=r"classify\(\["):
        Client("grpc://127.0.0.1:1").classify(single, ["a"])


def test_an_array_of_pictures(grpc_client: Client) -> None:
    assert grpc_client.encode(np.zeros((3, 5, 5, 3), np.uint8)).shape == (3, DIM)


MIXED = ["a", "/no/such.png", "b", {"image": b"bad"}, 3, "c"]
FAILED = [1, 3, 4]


def test_item_errors_are_raised_at_the_end(client: Client) -> None:
    with pytest.raises(ItemsError, match="3 of 6 items failed") as caught:
        client.encode(MIXED, batch_size=2)
    error = caught.value
    assert [failure.index for failure in error.errors] == FAILED
    assert "no such file" in str(error)
    assert "item 3: not a picture (3 bytes)" in str(error)
    assert [failure.item for failure in error.errors] == ["/no/such.png", "3 bytes", "int 3"]
    assert error.embeddings is not None
    good = [0, 2, 5]
    assert np.array_equal(error.embeddings[good], vectors("abc"))
    assert np.isnan(error.embeddings[FAILED]).all()
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.errors == error.errors
    assert [failure.item for failure in again.errors] == ["/no/such.png", "3 bytes", "int 3"]


def test_item_errors_are_returned(client: Client) -> None:
    embeddings, failures = client.encode(MIXED, on_item_error="return")
    assert [failure.index for failure in failures] == FAILED
    assert np.array_equal(np.isnan(embeddings).all(axis=1), np.isin(range(6), FAILED))
    assert client.encode(["a"], on_item_error="return")[1] == []


def test_only_failures(grpc_server: FakeServer, grpc_client: Client) -> None:
    embeddings, failures = grpc_client.encode([1, 2, 3], batch_size=2, on_item_error="return")
    assert embeddings.shape == (3, DIM)
    assert np.isnan(embeddings).all()
    assert [failure.index for failure in failures] == [0, 1, 2]
    assert grpc_server.requests == []


def test_an_item_may_fail_in_its_own_way(grpc_client: Client) -> None:
    class Broken:
        embedding = None

        @property
        def text(self) -> str:
            raise OSError("disk on fire")

    _, failures = grpc_client.encode(["a", Broken()], on_item_error="return")
    assert failures == [ItemFailure(1, "OSError: disk on fire")]


def test_callbacks(grpc_server: FakeServer, grpc_client: Client) -> None:
    done: list[Batch] = []
    failed: list[Batch] = []
    every: list[Batch] = []
    callbacks: dict[str, Any] = {"on_error": failed.append, "on_always": every.append}
    kept, _ = grpc_client.encode(MIXED, batch_size=2, on_item_error="return", **callbacks)
    assert kept.shape == (6, DIM)
    every.clear()
    failed.clear()
    with pytest.raises(ItemsError) as caught:
        grpc_client.encode(
            iter(MIXED), batch_size=2, on_done=done.append, on_item_error="raise", **callbacks
        )
    assert caught.value.embeddings is None
    assert [list(batch.indices) for batch in every] == [[0, 1], [2, 3], [4, 5]]
    # What is stored has an embedding.
    assert [list(batch.indices) for batch in done] == [[0], [2], [5]]
    assert all(np.isfinite(batch.embeddings).all() for batch in done)
    assert grpc_client.encode([3], on_done=pytest.fail, on_item_error="return")[0] is None
    assert [[failure.index for failure in batch.errors] for batch in failed] == [[1], [3], [4]]
    assert np.array_equal(done[2].embeddings[0], vector("c"))
    assert np.array_equal(every[2].embeddings[1], vector("c"))
    assert np.isnan(every[2].embeddings[0]).all()
    assert grpc_client.encode(["a"], on_done=done.append) is None
    assert all(batch.embeddings.flags.writeable for batch in done)

    every.clear()
    grpc_server.error = ("INTERNAL", "oh")
    with pytest.raises(ServerError, match="oh"):
        grpc_client.encode(["a", "b"], on_done=pytest.fail, on_always=every.append)
    assert [type(batch.exception) for batch in every] == [ServerError]
    assert every[0].indices == [0, 1]


def test_an_error_of_a_callback_is_raised(grpc_client: Client) -> None:
    def fails(_: Batch) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        grpc_client.encode(TEXTS, batch_size=10, on_done=fails)


def documents() -> list[Any]:
    return [SimpleNamespace(text=text, embedding=None) for text in (*"abc", "bad")]


def test_documents_get_their_embeddings(grpc_client: Client) -> None:
    given = documents()
    result, failures = grpc_client.encode(given, batch_size=2, on_item_error="return")
    assert result is given
    assert [failure.index for failure in failures] == [3]
    for one in given[:3]:
        assert np.array_equal(one.embedding, vector(one.text))
    assert given[3].embedding is None
    given[3].error, given[2].tags = None, {"clip_error": "of before", "mine": 1}
    grpc_client.encode(given, on_item_error="return")
    assert given[3].error == "not a picture"
    assert given[2].tags == {"mine": 1}
    del given[3].error
    given[3].tags = {}
    grpc_client.encode(given, on_item_error="return")
    assert given[3].tags == {"clip_error": "not a picture"}
    given = documents()
    assert grpc_client.encode(iter(given[:3])) == given[:3]
    assert given[2].embedding is not None
    given = documents()
    assert grpc_client.encode(["x", given[0]]).shape == (2, DIM)
    assert np.array_equal(given[0].embedding, vector("a"))
    assert grpc_client.encode(iter(given[1:3]), on_done=lambda _: None) is None
    assert np.array_equal(given[2].embedding, vector("c"))


def test_parameters(grpc_server: FakeServer, grpc_client: Client) -> None:
    grpc_client.encode(["a"], normalize=True, batch_size=np.int64(2), prefetch=np.uint8(1))
    assert grpc_server.requests.pop().options.normalize
    grpc_client.encode(["a"], parameters={"normalize": True, "minibatch_size": 16})
    options = grpc_server.requests[0].options
    assert options.normalize
    assert options.minibatch_size == 16
    # As users of clip-as-service pass them.
    grpc_client.encode(["a"], parameters={"batch_size": 8, "drop_image_content": True})
    assert grpc_server.requests[1].options.minibatch_size == 8
    for wrong in ({"normalise": True}, {"minibatch_size": -1}, {"minibatch_size": "x"}):
        with pytest.raises(InvalidInputError, match="parameter"):
            grpc_client.encode(["a"], parameters=wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"batch_size": 2.5},
        {"batch_size": True},
        {"prefetch": 0},
        {"prefetch": np.bool_(True)},
        {"normalize": "false"},
        {"timeout": -1},
        {"timeout": 0},
        {"timeout": "5"},
        {"on_item_error": "ignore"},
    ],
)
def test_wrong_options(grpc_client: Client, wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(wrong))):
        grpc_client.encode(["a"], **wrong)


def test_progress(grpc_client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    grpc_client.encode(TEXTS, show_progress=True)
    assert "300/300" in capfd.readouterr().err
    grpc_client.encode(TEXTS[:9], show_progress=True)
    shown = capfd.readouterr().err
    assert re.search(r"9/9 [\d,.]*[1-9][\d,.]* items/s, \S+ elapsed, \S+ left", shown), shown
    grpc_client.encode(iter(TEXTS), show_progress=True)
    assert "300/" in capfd.readouterr().err
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: grpc_client.encode(TEXTS, show_progress=True), range(4)))
    grpc_client.encode(TEXTS)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("300/300") == 4


def test_many_threads_share_a_client(server: FakeServer, client: Client) -> None:
    server.shuffle, server.delay = True, 0.002

    def work(thread: int) -> bool:
        texts = [f"{thread}/{number}" for number in range(100)]
        return np.array_equal(client.encode(texts, batch_size=9), vectors(texts))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    if server.scheme != "http":
        assert server.connections == 1


def test_async(server: FakeServer) -> None:
    server.shuffle, server.delay = True, 0.002

    async def texts() -> AsyncIterator[str]:
        for text in TEXTS:
            await asyncio.sleep(0)
            yield text

    async def work() -> None:
        async with Client(server.address) as client:
            results = await asyncio.gather(
                client.aencode(TEXTS, batch_size=50),
                client.aencode(texts(), batch_size=50),
                *(client.aencode([text]) for text in TEXTS[:100]),
            )
            assert np.array_equal(results[0], vectors(TEXTS))
            assert np.array_equal(results[1], vectors(TEXTS))
            assert np.array_equal(np.concatenate(results[2:]), vectors(TEXTS[:100]))
            best = (await client.arank("a", ["b", "a"]))[0]
            assert best.item == "a"
            assert len(await client.aclassify([b"x"], ["a", "b"])) == 1
            assert (await client.ainfo()).dim == DIM

    asyncio.run(work())


def test_a_client_outlives_event_loops(client: Client) -> None:
    for _ in range(3):
        assert asyncio.run(client.aencode(["a"])).shape == (1, DIM)
    assert client.encode(["a"]).shape == (1, DIM)


def test_sync_calls_work_inside_a_running_loop(grpc_client: Client) -> None:
    async def work() -> Any:
        return grpc_client.encode(["a"])

    assert asyncio.run(work()).shape == (1, DIM)


def test_sync_calls_refuse_async_generators(grpc_client: Client) -> None:
    async def texts() -> AsyncIterator[str]:
        yield "a"

    with pytest.raises(TypeError, match="aencode"):
        grpc_client.encode(texts())


def test_async_cancellation(server: FakeServer, client: Client) -> None:
    async def work() -> None:
        server.gate.clear()
        task = asyncio.create_task(client.aencode(TEXTS, batch_size=10))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.gate.set()
        assert np.array_equal(await client.aencode(["a"]), vectors("a"))

    asyncio.run(work())


def test_the_connection_is_kept(server: FakeServer, client: Client) -> None:
    for _ in range(5):
        client.encode(["a"])
    assert server.connections == 1


def test_a_restarted_server_is_found_again(server: FakeServer, client: Client) -> None:
    assert client.encode(["a"]).shape == (1, DIM)
    server.stop()
    with pytest.raises(ConnectionFailedError, match="no server answered at"):
        client.encode(["a"], timeout=1)
    with FakeServer(server.scheme, server.port) as again:
        assert np.array_equal(client.encode(TEXTS, batch_size=20), vectors(TEXTS))
        assert again.connections >= 1


def test_a_restart_between_calls_goes_unnoticed(server: FakeServer, client: Client) -> None:
    client.encode(["a"])
    server.stop()
    with FakeServer(server.scheme, server.port):
        assert np.array_equal(client.encode(TEXTS, batch_size=20), vectors(TEXTS))


def test_a_request_goes_twice_when_the_connection_breaks(
    server: FakeServer, client: Client
) -> None:
    client.encode(["a"])
    server.drops = 1
    assert np.array_equal(client.encode(["b"]), vectors("b"))
    server.drops = 100
    with pytest.raises(ConnectionFailedError, match="no server answered at"):
        client.encode(["c"])
    server.drops = 0
    assert np.array_equal(client.encode(["d"]), vectors("d"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_server(scheme: str) -> None:
    with (
        Client(f"{scheme}://127.0.0.1:1", connect_timeout=0.2) as client,
        pytest.raises(
            ConnectionFailedError,
            match=rf"no server answered at {scheme}://127.0.0.1:1 \(Connection refused\)"
            r".*python -m clip_server.* Tried for [\d.]+ s \(`connect_timeout`\)\.",
        ),
    ):
        client.encode(["a"])


@pytest.mark.parametrize(("served", "spoken"), [*itertools.permutations(SCHEMES, 2)])
def test_the_wrong_scheme(served: str, spoken: str) -> None:
    with (
        FakeServer(served) as server,
        Client(f"{spoken}://127.0.0.1:{server.port}", connect_timeout=0.2) as client,
        pytest.raises((ConnectionFailedError, ServerError), match=f"{spoken}://|http://"),
    ):
        client.encode(["a"], timeout=5)


def test_credentials(server: FakeServer) -> None:
    server.credential = "s3cret"
    for credential in ("s3cret", {"authorization": "Bearer s3cret"}):
        with Client(server.address, credential=credential) as client:  # type: ignore[arg-type]
            assert client.encode(["a"]).shape == (1, DIM)
            assert "s3cret" not in repr(client)
    for wrong in (None, "guess"):
        with (
            Client(server.address, credential=wrong) as client,
            pytest.raises(AuthenticationError, match="credential is wrong") as caught,
        ):
            client.encode(["a"])
        assert caught.value.code == "UNAUTHENTICATED"


@pytest.mark.parametrize("wrong", ["", "a\nb", "é", {"Authorization": ""}, {"token": "x"}])
def test_wrong_credentials(wrong: Any) -> None:
    with pytest.raises(InvalidInputError, match="a credential is"):
        Client("grpc://127.0.0.1:1", credential=wrong)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("RESOURCE_EXHAUSTED", OverloadedError),
        ("DEADLINE_EXCEEDED", DeadlineExceededError),
        ("UNAUTHENTICATED", AuthenticationError),
        ("INVALID_ARGUMENT", ServerError),
        ("UNAVAILABLE", ServerError),
        ("INTERNAL", ServerError),
    ],
)
def test_errors_of_the_server(
    server: FakeServer, client: Client, code: str, kind: type[ServerError]
) -> None:
    server.error = (code, "because")
    with pytest.raises(ServerError, match="because") as caught:
        client.encode(["a"])
    assert type(caught.value) is kind
    assert caught.value.code == code
    server.error = None
    assert client.encode(["a"]).shape == (1, DIM)
    assert server.connections == 1


def test_timeouts(server: FakeServer, client: Client) -> None:
    server.gate.clear()
    start = time.perf_counter()
    with pytest.raises(DeadlineExceededError, match=r"did not answer within 0.2 s"):
        client.encode(["a"], timeout=0.2)
    assert time.perf_counter() - start < 20  # and not for ever: the gate is still closed
    server.gate.set()
    assert np.array_equal(client.encode(["b"], timeout=None), vectors("b"))


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:51000", "did you mean 'grpc://127.0.0.1:51000'"),
        ("ftp://host:1", "use one of grpc://, grpcs://, http://, https://, ws://, wss://"),
        ("grpc://", "not of the form"),
        ("grpc://host:port", "is no address"),
        ("grpc://host:99999", "is no address"),
        ("http://user:word@host", "not of the form"),
        ("grpc://host:51000/path", "has no path"),
        ("", "no scheme"),
    ],
)
def test_wrong_addresses(address: str, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        Client(address)


@pytest.mark.parametrize(
    ("address", "full"),
    [
        ("grpc://host", "grpc://host:51000"),
        ("grpcs://host", "grpcs://host:443"),
        ("HTTPS://host/clip/", "https://host:443/clip"),
        ("ws://[::1]:51002", "ws://[::1]:51002"),
    ],
)
def test_addresses(address: str, full: str) -> None:
    assert repr(Client(address)) == f"Client({full!r})"


def test_rank(client: Client) -> None:
    rankings = client.rank("a", ["b", "a", b"JPEG"])
    assert sorted(one.index for one in rankings) == [0, 1, 2]
    assert (rankings[0].index, rankings[0].item) == (1, "a")
    assert rankings[0].cosine == pytest.approx(1)
    assert sum(one.probability for one in rankings) == pytest.approx(1)
    assert rankings == sorted(rankings, key=lambda one: -one.probability)
    cosine = vectors("ab")
    cosine /= np.linalg.norm(cosine, axis=1, keepdims=True)
    b = next(one for one in rankings if one.item == "b")
    assert b.cosine == pytest.approx(float(cosine[0] @ cosine[1]), rel=1e-6)
    assert client.rank("a", []) == []


def test_rank_has_no_limit(grpc_server: FakeServer, grpc_client: Client) -> None:
    rankings = grpc_client.rank("text 250", TEXTS)
    assert rankings[0].item == "text 250"
    assert len(grpc_server.requests) == 3


def test_failures_in_rank(grpc_client: Client) -> None:
    rankings, failures = grpc_client.rank("a", ["bad", "b", 3], on_item_error="return")
    assert [one.index for one in rankings] == [1]
    assert [failure.index for failure in failures] == [0, 2]
    with pytest.raises(ItemsError, match="2 of 3 items failed"):
        grpc_client.rank("a", ["bad", "b", 3])
    with pytest.raises(InvalidInputError, match="the query cannot be encoded: not a picture"):
        grpc_client.rank("bad", ["a"])


def test_rank_documents(grpc_client: Client) -> None:
    def matched(text: str, *candidates: str) -> Any:
        matches = [
            SimpleNamespace(text=one, embedding=None, tags={}, scores=None) for one in candidates
        ]
        return SimpleNamespace(text=text, embedding=None, matches=matches)

    class Score:
        value = 0.0

    given = [matched("a", "b", "bad", "a"), matched("c", "c")]
    given[1].matches[0].scores = {"clip_score": Score()}
    result, failures = grpc_client.rank(given, on_item_error="return")
    assert result is given
    assert failures == [ItemFailure(1, "not a picture")]
    assert [match.text for match in given[0].matches] == ["a", "b", "bad"]
    best, second, failed = given[0].matches
    assert best.tags["clip_score"] + second.tags["clip_score"] == pytest.approx(1)
    assert best.tags["clip_score_cosine"] == pytest.approx(1)
    assert failed.tags == {}
    assert given[1].matches[0].scores["clip_score"].value == pytest.approx(1)
    assert given[0].embedding is None
    assert grpc_client.rank(iter(given[1:])) == given[1:]
    for wrong in ([matched("d")], iter([given[1], matched("d")])):
        with pytest.raises(ValueError, match=r"needs Documents with `\.matches`"):
            grpc_client.rank(wrong)


def test_classify(client: Client) -> None:
    labels = ["cat", "dog", "{}"]
    results = client.classify([b"JPEG", b"PNG"], labels)
    assert len(results) == 2
    for result in results:
        assert sorted(one.label for one in result) == sorted(labels)
        assert sum(one.probability for one in result) == pytest.approx(1)
        assert result == sorted(result, key=lambda one: -one.probability)
    assert client.classify([], labels) == []


def test_classify_sends_prompts_and_pictures(
    grpc_server: FakeServer, grpc_client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "cat"
    path.write_bytes(b"PNG")
    grpc_client.classify([str(path)], ["cat.jpg", "{}"], prompt="is it {}?")
    prompts, pictures = grpc_server.requests
    assert [item.text for item in prompts.items] == ["is it cat.jpg?", "is it {}?"]
    assert [item.image for item in pictures.items] == [b"PNG"]
    results, failures = grpc_client.classify([b"x", b"bad"], ["a"], on_item_error="return")
    assert results[0][0].probability == 1
    assert results[1] is None
    assert failures == [ItemFailure(1, "not a picture")]


def test_wrong_classify(grpc_client: Client) -> None:
    for labels in ("cat", []):
        with pytest.raises(InvalidInputError, match="labels is a list"):
            grpc_client.classify([b"x"], labels)
    with pytest.raises(InvalidInputError, match="for the label to go"):
        grpc_client.classify([b"x"], ["a"], prompt="a photo")
    with pytest.raises(InvalidInputError, match="label 'bad': not a picture"):
        grpc_client.classify([b"x"], ["a", "bad"], prompt="{}")


def test_profile(server: FakeServer, client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    server.delay = 0.01
    lines = client.profile()
    assert list(lines) == [
        "Roundtrip",
        "Client-server network",
        "Server",
        "Gateway-CLIP network",
        "CLIP model",
    ]
    assert lines["Roundtrip"] > 10
    assert lines["Server"] == 4
    assert lines["CLIP model"] == 3
    assert lines["Client-server network"] + lines["Server"] == lines["Roundtrip"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*lines, "Inference"))
    assert "CLIP model  3.0 ms  75 %" in shown
    assert server.items[-1].text


def test_info(client: Client) -> None:
    info = client.info()
    assert (info.model, info.dim) == ("fake", DIM)
    assert "model='fake'" in str(info)
    assert json.loads(json.dumps(dataclasses.asdict(info)))["dim"] == DIM


def test_a_closed_client(server: FakeServer) -> None:
    client = Client(server.address)
    client.encode(["a"])
    client.close()
    client.close()
    for closed in (RuntimeError, ClientClosedError):
        with pytest.raises(closed, match="this Client is closed"):
            client.encode(["a"])
    asyncio.run(client.aclose())
    Client(server.address).close()


def test_a_client_is_pickled(server: FakeServer) -> None:
    server.credential = "s3cret"
    with Client(server.address, "s3cret", connect_timeout=7) as client:
        client.encode(["a"])
        with pickle.loads(pickle.dumps(client)) as again:
            assert repr(again) == repr(client)
            assert len(again.encode(["a"])) == 1
        assert len(client.encode(["a"])) == 1


def test_every_exception_stands_in_the_docs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "client.md").read_text("utf-8")
    for kind in vars(clip_client.errors).values():
        if isinstance(kind, type) and issubclass(kind, (ClipError, ClipWarning)):
            assert kind.__name__ in page
            assert kind.__name__ in str(clip_client.errors.__doc__)
            assert getattr(clip_client, kind.__name__) is kind


@pytest.mark.parametrize("kind", [list, iter])
def test_an_error_carries_what_was_computed(
    server: FakeServer, client: Client, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = kind(TEXTS)
    answer, count = server.answer, itertools.count()

    def fail_late(request: Any) -> Any:
        if request.HasField("encode") and next(count) == 10:
            server.error = ("INTERNAL", "oh")
        return answer(request)

    monkeypatch.setattr(server, "answer", fail_late)
    with pytest.raises(ServerError, match="oh") as caught:
        client.encode(items, batch_size=10, prefetch=3)
    found = caught.value.embeddings
    assert found is not None
    computed = np.isfinite(found).all(axis=1)
    assert 70 <= computed.sum() <= 100
    assert np.array_equal(found[computed], vectors(TEXTS)[: len(found)][computed])
    assert len(found) == 300 if kind is list else computed.sum() <= len(found) <= 300
    assert np.array_equal(pickle.loads(pickle.dumps(caught.value)).embeddings, found, True)


def test_an_error_before_all_embeddings(grpc_server: FakeServer, grpc_client: Client) -> None:
    grpc_server.error = ("INTERNAL", "oh")
    with pytest.raises(ServerError, match="oh") as caught:
        grpc_client.encode(["a", "b"])
    assert caught.value.embeddings is not None
    assert caught.value.embeddings.shape == (2, 0)
    grpc_server.error = None

    def breaks() -> Iterator[str]:
        yield from TEXTS[:20]
        raise KeyError("mine")

    with pytest.raises(KeyError) as mine:
        grpc_client.encode(breaks(), batch_size=1, prefetch=1)
    found = vars(mine.value)["embeddings"]
    assert np.array_equal(found[:18], vectors(TEXTS[:18]))


def test_a_server_that_restarts_is_waited_for(
    server: FakeServer, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    restarted: list[FakeServer] = []

    def restart() -> None:
        server.stop()
        time.sleep(0.7)
        restarted.append(FakeServer(server.scheme, server.port))

    def texts() -> Iterator[str]:
        for number, text in enumerate(TEXTS):
            if number == 100:
                worker.start()
            time.sleep(0.003)
            yield text

    worker = threading.Thread(target=restart)
    result = client.encode(texts(), batch_size=7, timeout=30)
    worker.join()
    assert np.array_equal(result, vectors(TEXTS))
    restarted[0].stop()
    assert restarted[0].connections
    assert any("Trying again for up to 30 s" in line for line in caplog.messages)


def test_a_server_may_start_after_its_client(server: FakeServer) -> None:
    server.stop()
    started: list[FakeServer] = []
    later = threading.Timer(0.5, lambda: started.append(FakeServer(server.scheme, server.port)))
    later.start()
    with Client(server.address) as client:
        assert len(client.encode(["a"])) == 1
    later.join()
    started[0].stop()


def test_texts_that_were_cut(server: FakeServer, client: Client) -> None:
    server.truncated = 2
    with pytest.warns(TruncationWarning, match="6 texts were truncated") as caught:
        client.encode(TEXTS[:30], batch_size=10)
    (one,) = caught
    assert isinstance(one.message, TruncationWarning)
    assert one.message.count == 6
    assert one.filename == __file__
    with pytest.warns(TruncationWarning, match="2 texts"):
        client.rank("a", ["b"])

    async def work() -> None:
        await client.aclassify([b"x"], ["b"])

    with pytest.warns(TruncationWarning, match="2 texts") as caught:
        asyncio.run(work())
    assert caught[0].filename == __file__


def test_close_ends_requests_under_way(server: FakeServer) -> None:
    client = Client(server.address)
    client.encode(["a"])
    server.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.encode, ["b"])
        time.sleep(0.1)
        client.close()
        with pytest.raises((ConnectionFailedError, RuntimeError)):
            running.result(60)
        server.gate.set()


def test_a_forgotten_client_closes_its_connection(grpc_server: FakeServer) -> None:
    client = Client(grpc_server.address)
    client.encode(["a"])
    connection = client._connection
    closer = connection._closer
    del client, connection
    gc.collect()
    assert closer is not None
    assert not closer.alive


def _run(script: str, *arguments: str) -> str:
    """Runs a script in a fresh interpreter with warnings as errors; gives its output."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(clip_client.__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_what_is_imported(server: FakeServer) -> None:
    _run(
        """
import sys
from clip_client import Client
late = {"grpc", "aiohttp", "websockets", "rich", "PIL"} & set(sys.modules)
assert not late, late
Client(sys.argv[1]).encode(["a", b"JPEG"])
wrong = {"jina", "docarray", "pydantic", "torch", "PIL", "clip_server"} & set(sys.modules)
assert not wrong, wrong
others = {"grpc", "aiohttp", "websockets"} & set(sys.modules)
assert len(others) == 1, others
""",
        server.address,
    )


def test_an_interpreter_ends_quietly(server: FakeServer) -> None:
    """With a connection open, and with requests under way in a daemon thread."""
    server.delay = 0.2
    script = """
import contextlib, sys, threading, time
from clip_client import Client
client = Client(sys.argv[1])
client.encode(["a"])
def work():
    with contextlib.suppress(Exception):
        client.encode(["b"] * 100, batch_size=1)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
print("end")
"""
    assert _run(script, server.address) == "end\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("scheme", ["http", "ws"])
def test_a_forked_child_opens_its_own_connection(scheme: str) -> None:
    script = """
import gc, os, sys, warnings
from clip_client import Client
warnings.simplefilter("ignore")  # of Python 3.12, about any fork beside threads
client = Client(sys.argv[1])
client.encode(["a"])
child = os.fork()
if child == 0:
    works = client.encode(["b"]).shape == (1, 4)
    # What it holds of its parent's connection goes with it, and leaves that one alone.
    del client
    gc.collect()
    os._exit(0 if works else 1)
assert os.waitpid(child, 0)[1] == 0
client.encode(["c"])
"""
    with FakeServer(scheme) as server:
        _run(script, server.address)
        assert server.connections == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_grpc_refuses_to_hang_in_a_forked_child(grpc_server: FakeServer) -> None:
    script = """
import os, sys, warnings
from clip_client import Client, ConnectionFailedError
warnings.simplefilter("ignore")
client = Client(sys.argv[1])
client.encode(["a"])
child = os.fork()
if child == 0:
    for mine in (client, Client(sys.argv[1])):
        try:
            mine.encode(["b"])
        except ConnectionFailedError as error:
            print("spawn" in str(error), flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
client.encode(["c"])
"""
    assert _run(script, grpc_server.address) == "True\nTrue\n"


@pytest.mark.parametrize("name", ["encode", "rank", "classify", "profile", "info"])
def test_sync_and_async_twins_take_the_same(name: str) -> None:
    """The same parameters, defaults and result, except what only an event loop can give."""

    def described(method: Any) -> tuple[Any, ...]:
        signature = inspect.signature(method)
        parameters = [each.replace(annotation=None) for each in signature.parameters.values()]
        return parameters, signature.return_annotation

    assert described(getattr(Client, name)) == described(getattr(Client, f"a{name}"))


def test_every_public_error_is_caught_as_one_of_the_client() -> None:
    public = {name: getattr(clip_client, name) for name in clip_client.__all__}
    raised = {
        name
        for name, each in public.items()
        if issubclass(each, Exception) and not issubclass(each, Warning)
    }
    assert len(raised) > 5
    assert not [name for name in raised if not issubclass(public[name], ClipError)]
