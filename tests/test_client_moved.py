"""Calls of the Client as users of clip-as-service have written them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import free_ports
from fake_server import DIM, FakeServer, vector
from guard import popen

from clip_client import (
    AuthenticationError,
    Batch,
    Client,
    ConnectionFailedError,
    InvalidInputError,
    ServerError,
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer("grpc") as fake:
        yield fake


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address, connect_timeout=0.2) as one:
        yield one


def document(text: str, **fields: Any) -> Any:
    return SimpleNamespace(text=text, embedding=None, tags={}, scores={}, **fields)


def matched(text: str, *candidates: str, source: str = "matches") -> Any:
    return document(text, **{source: [document(each) for each in candidates]})


def test_keywords(client: Client) -> None:
    assert client.encode(content=["a", "b"]).shape == (2, DIM)
    (ranked,) = client.rank(docs=[matched("a", "b", "a")])
    assert [each.text for each in ranked.matches] == ["a", "b"]
    (ranked,) = client.rank(docs=[matched("a", "b", "a", source="chunks")], source="chunks")
    assert [each.text for each in ranked.chunks] == ["a", "b"]
    assert ranked.chunks[0].scores["clip_score"] > ranked.chunks[1].scores["clip_score"]
    with pytest.raises(ValueError, match=r"Documents with `\.chunks`"):
        client.rank(docs=[matched("a", "b")], source="chunks")
    with pytest.raises(TypeError, match="either a query and candidates, or docs"):
        client.rank("a", docs=[matched("a", "b")])
    with pytest.raises(TypeError, match="rank takes"):
        client.rank(docs=["a"])


def test_rank_has_the_options_of_encode(server: FakeServer, client: Client) -> None:
    done: list[Batch] = []
    every: list[Batch] = []
    given = [matched(text, "b", "a") for text in "abababa"]
    options: dict[str, Any] = {"prefetch": 2, "show_progress": False, "parameters": {}}
    result = client.rank(
        iter(given),
        batch_size=3,
        on_done=done.append,
        on_error=pytest.fail,
        on_always=every.append,
        **options,
    )
    assert result is None
    assert [list(batch.indices) for batch in done] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.docs for batch in every] == [given[:3], given[3:6], given[6:]]
    assert [each.matches[0].text for each in given] == list("abababa")
    assert np.array_equal(done[0].embeddings[1], vector("b"))
    assert done[0].header.exec_endpoint == "/rank"
    assert done[0][0] is given[0]
    done.clear()
    ranking = client.arank("a", ["b", "a"], on_done=done.append, batch_size=1)
    assert asyncio.run(ranking) is None
    assert [each.item for each in done[0]] == ["a", "b"]
    assert max(len(request.items) for request in server.requests[-3:]) == 1
    client.rank("a", ["b"], parameters={"model_name": "RN50", "minibatch_size": 7})
    assert (server.requests[-1].model, server.requests[-1].options.minibatch_size) == ("RN50", 7)


def test_rank_handles_failures(server: FakeServer, client: Client) -> None:
    failed: list[Batch] = []
    done: list[Batch] = []
    given = [matched("a", "bad", "a"), matched("bad", "a"), matched("c", "c")]
    result = client.rank(given, on_error=failed.append, batch_size=1)
    assert result is given
    assert [failure.index for failure in failed[0].errors] == [0]
    assert [each.text for each in given[0].matches] == ["a", "bad"]
    assert "the query cannot be encoded" in failed[1].header.status.description
    assert len(failed) == 2
    client.rank(given, on_done=done.append, on_error=failed.append)
    assert [list(batch.indices) for batch in done] == [[0, 2]]
    server.error = ("INTERNAL", "oh")
    failed.clear()
    # The model's logit scale cannot be asked either.
    client.rank(given, on_error=failed.append)
    assert {type(batch.exception) for batch in failed} == {ServerError}


def test_callbacks_get_a_response(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"JPEG")
    done: list[Batch] = []
    items = ["a", str(path), {"text": "b", "id": "7", "tags": {"x": 1}}, b"PNG"]
    parameters = {"drop_image_content": True}
    assert client.encode(items, on_done=done.append, parameters=parameters) is None
    (response,) = done
    assert [each.text for each in response.docs] == response.docs.texts == ["a", "", "b", ""]
    assert [each.uri for each in response.docs] == ["", str(path), "", ""]
    assert [each.blob for each in response.docs] == [b""] * 4
    assert (response.docs[2].id, response.docs[2].tags) == ("7", {"x": 1})
    assert len({each.id for each in response.docs}) == 4
    embeddings = [vector(each) for each in ("a", b"JPEG", "b", b"PNG")]
    assert np.array_equal(response.docs.embeddings, embeddings)
    assert np.array_equal(response.data.docs[1].embedding, embeddings[1])
    assert response.parameters == parameters
    assert (response.header.status.code, response.header.exec_endpoint) == (0, "/encode")
    # As a sequence it is what `encode` would have returned.
    assert len(response) == 4
    assert np.array_equal(np.asarray(response), embeddings)
    assert np.array_equal(list(response)[1], embeddings[1])
    client.encode(items, on_always=done.append, parameters={"drop_image_content": False})
    assert [each.blob for each in done[1].docs] == [b"", b"JPEG", b"", b"PNG"]
    given = [document("a"), document("b")]
    client.encode(given, on_done=done.append)
    assert list(done[2]) == list(done[2].docs) == given
    assert np.array_equal(done[2].docs.embeddings, [vector("a"), vector("b")])


def test_on_error_handles_the_error(server: FakeServer, client: Client) -> None:
    failed: list[Batch] = []
    result = client.encode(["a", "bad", "c"], on_error=failed.append)
    assert np.isnan(result[1]).all()
    assert np.array_equal(result[[0, 2]], [vector("a"), vector("c")])
    assert failed[0].header.status.code == 1
    assert "not a picture" in failed[0].header.status.description
    assert failed[0].docs[1].error == "not a picture"
    server.error = ("INTERNAL", "oh")
    failed.clear()
    result = client.encode(["a", "b", "c"], batch_size=2, on_error=failed.append)
    assert np.shape(result) == (3, 0)
    assert [batch.header.status.description for batch in failed] == ["oh", "oh"]
    assert [each.text for each in failed[1].docs] == ["c"]
    assert client.encode(["a"], on_done=pytest.fail, on_error=failed.append) is None


def test_one_failed_request_does_not_end_the_call(server: FakeServer, client: Client) -> None:
    failed: list[Batch] = []

    def recover(batch: Batch) -> None:
        failed.append(batch)
        server.error = None

    server.error = ("INTERNAL", "oh")
    result = client.encode(["a", "b", "c"], batch_size=1, prefetch=1, on_error=recover)
    assert [list(batch.indices) for batch in failed] == [[0]]
    assert np.isnan(result[0]).all()
    assert np.array_equal(result[1:], [vector("b"), vector("c")])


def test_errors_outside_of_a_request_are_raised(server: FakeServer, client: Client) -> None:
    callbacks: dict[str, Any] = {"on_error": pytest.fail, "on_always": pytest.fail}
    server.error = ("UNAUTHENTICATED", "who?")
    with pytest.raises(AuthenticationError):
        client.encode(["a"], **callbacks)
    server.stop()
    with Client(server.address, connect_timeout=0.2) as other:
        with pytest.raises(ConnectionError) as caught:
            other.encode(["a"], **callbacks)
        assert type(caught.value) is ConnectionFailedError
        with pytest.raises(ConnectionError):
            other.rank("a", ["b"], **callbacks)


def test_parameters(server: FakeServer, client: Client) -> None:
    given = {"model_name": "ViT-L-14", "batch_size": 16, "traversal_paths": "@r"}
    client.encode(["a"], parameters=given)
    assert server.requests[-1].model == "ViT-L-14"
    assert server.requests[-1].options.minibatch_size == 16
    assert given == {"model_name": "ViT-L-14", "batch_size": 16, "traversal_paths": "@r"}
    for wrong in (
        {"model_name": 3},
        {"access_paths": "@x"},
        {"access_paths": ["@c"]},
        {"drop_image_content": "yes"},
    ):
        with pytest.raises(InvalidInputError, match=next(iter(wrong))):
            client.encode(["a"], parameters=wrong)


def test_access_paths(client: Client) -> None:
    def family(text: str) -> Any:
        chunks = [document(f"{text}1", chunks=[document(f"{text}11")]), document(f"{text}2")]
        return document(text, chunks=chunks, matches=[document(f"{text}m")])

    given = [family("a"), family("b")]
    assert client.encode(given, parameters={"access_paths": "@c"}) is given
    for one in given:
        assert one.embedding is None
        assert [each.embedding[1] for each in one.chunks] == [2, 2]
    given = [family("a")]
    assert client.encode(iter(given), parameters={"access_paths": "@r,m,cc"}) == given
    assert np.array_equal(given[0].embedding, vector("a"))
    assert np.array_equal(given[0].matches[0].embedding, vector("am"))
    assert np.array_equal(given[0].chunks[0].chunks[0].embedding, vector("a11"))
    assert given[0].chunks[0].embedding is None
    with pytest.raises(InvalidInputError, match="access_paths are those of Documents, not of str"):
        client.encode(["a"], parameters={"access_paths": "@c"})
    nested = document("root", chunks=[matched("a", "b", "a")])
    client.rank([nested], parameters={"access_paths": "@c"})
    assert [each.text for each in nested.chunks[0].matches] == ["a", "b"]


def test_credentials(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def sent(credential: Any) -> str | None:
        headers: list[str | None] = []
        monkeypatch.setattr(server, "admits", lambda header: not headers.append(header))
        with Client(server.address, credential=credential) as client:
            client.encode(["a"])
        return headers[0]

    assert sent({"Authorization": "my-token"}) == "my-token"
    assert sent({"Authorization": "Basic eDp5"}) == "Basic eDp5"
    assert sent("my-token") == "Bearer my-token"
    assert sent({}) is None
    assert sent(None) is None
    monkeypatch.setenv("CLIP_AUTH_TOKEN", "from the environment")
    assert sent({}) == sent(None) == "from the environment"
    assert sent({"Authorization": "mine"}) == "mine"


def test_profile(server: FakeServer, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg"
    path.write_bytes(b"JPEG")
    for content in ("", "hello world", str(path)):
        lines = client.profile(content=content)
        assert all(isinstance(value, float) for value in lines.values())
    assert [item.image for item in server.items[-2:]] == [b"JPEG"] * 2
    with pytest.raises(InvalidInputError, match="not a picture"):
        client.profile("bad")
    with pytest.raises(InvalidInputError, match="no such file"):
        client.profile("missing.jpg")


@pytest.mark.parametrize(
    ("address", "scheme"),
    [("websocket://h:1", "ws"), ("websockets://h:1", "wss"), ("WSS://h:1", "wss")],
)
def test_schemes(address: str, scheme: str) -> None:
    assert repr(Client(address)) == f"Client('{scheme}://h:1')"


STOCK_FLOW = """
import sys, warnings
warnings.filterwarnings('ignore')
from jina import Flow
ports = [int(port) for port in sys.argv[1:]]
with Flow(port=ports, protocol=['grpc', 'http', 'websocket'], host='127.0.0.1') as flow:
    print('ready', flush=True)
    flow.block()
"""


@pytest.mark.slow
def test_a_gateway_of_jinas_own_is_named() -> None:
    ports = free_ports(3)
    command = [sys.executable, "-c", STOCK_FLOW, *map(str, ports)]
    environment = {**os.environ, "JINA_OPTOUT_TELEMETRY": "1"}
    with popen(command, stdout=subprocess.PIPE, text=True, env=environment) as flow:
        family = psutil.Process(flow.pid)
        try:
            assert flow.stdout is not None
            assert any("ready" in line for line in flow.stdout)
            for scheme, port in zip(("grpc", "http", "ws"), ports, strict=True):
                with (
                    Client(f"{scheme}://127.0.0.1:{port}") as client,
                    pytest.raises(ServerError, match=r"is a Jina gateway without clip\.v1: start"),
                ):
                    client.encode(["a"], timeout=30)
        finally:
            for each in (*family.children(recursive=True), family):
                each.kill()
