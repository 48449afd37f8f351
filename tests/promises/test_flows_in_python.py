"""Flows that users of clip-as-service start in Python, around our executors and their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Server, free_ports
from docarray import DocList
from guard import popen
from guide import CAT, DIM, SENTENCES, Document, Match, rows, texts

from clip_client import Client, ConnectionFailedError, ServerError

jina = pytest.importorskip("jina")
pytestmark = pytest.mark.slow


@contextmanager
def stock_flow(module: str, protocol: str, executor: str, **environment: str) -> Iterator[int]:
    """The port of a Flow in a process of its own."""
    (port,) = free_ports(1)
    process = popen(
        [
            *(sys.executable, Path(__file__).with_name("stock_flow.py")),
            *(module, str(port), protocol, executor),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert any(b"ready" in line for line in process.stdout), "the Flow ended"
        yield port
    finally:
        process.stdin.close()
        process.stdout.read()
        process.wait(30)
        process.stdout.close()


@pytest.fixture(
    scope="module",
    params=[("clip_server", "grpc"), ("jina", "grpc"), ("jina", "http"), ("jina", "websocket")],
    ids="-".join,
)
def flow_address(request: pytest.FixtureRequest) -> Iterator[str]:
    module, protocol = request.param
    with stock_flow(module, protocol, "encoder") as port:
        yield f"{protocol}://0.0.0.0:{port}"


def test_encode_and_rank(flow_address: str, onnx_server: Server) -> None:
    """`from jina import Flow` around our CLIPEncoder, and `from clip_server import Flow`."""
    with Client(flow_address) as c, Client(onnx_server.grpc) as other:
        found = c.encode([*SENTENCES, str(CAT)])
        np.testing.assert_allclose(
            found, other.encode([*SENTENCES, str(CAT)]), rtol=1e-3, atol=1e-3
        )
        result = c.encode(DocList[Document]([Document(text="hello"), Document(uri=str(CAT))]))
        assert rows(result).shape == (2, DIM)
        matches = DocList[Match]([Match(text="a car"), Match(text="a cat")])
        (document,) = c.rank([Document(uri=str(CAT), matches=matches)])
        assert texts(document.matches) == ["a cat", "a car"]
        assert c.profile(content="hello world")["Roundtrip"] > 0


def test_jinas_own_gateway_says_what_to_change() -> None:
    with (
        stock_flow("jina", "grpc", "unseen") as port,
        Client(f"grpc://0.0.0.0:{port}") as c,
        pytest.raises(ServerError, match=r"clip_server\.Flow"),
    ):
        c.encode(SENTENCES)


def test_an_executor_by_itself() -> None:
    """`jina executor --uses`, asked by our client and by Jina's."""
    from clip_server.executors.documents import ClipDoc

    (port,) = free_ports(1)
    file = Path(__file__).with_name("unseen_encoder.yml")
    arguments = ("executor", "--uses", str(file), "--port", str(port), "--host", "127.0.0.1")
    process = popen(
        [sys.executable, "-W", "ignore", "-m", "jina", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with Client(f"grpc://127.0.0.1:{port}") as client:
            wait_for(client)
            assert client.encode(SENTENCES).shape == (3, DIM)
        (document,) = jina.Client(host="127.0.0.1", port=port).post(
            "/encode", DocList[ClipDoc]([ClipDoc(text="hello")]), return_type=DocList[ClipDoc]
        )
        assert document.embedding.shape == (DIM,)
    finally:
        process.terminate()
        process.wait(30)


def wait_for(client: Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.info()
            return
        except ConnectionFailedError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@pytest.mark.parametrize("call", ["encode", "rank"])
def test_on_error_of_an_executor_that_fails(failing: Client, call: str) -> None:
    got: dict[str, list[Any]] = {"on_done": [], "on_error": [], "on_always": []}
    callbacks: dict[str, Callable[[Any], None]] = {name: each.append for name, each in got.items()}
    sent = DocList[Document]([Document(text="hello", matches=DocList[Match]([Match(text="jina")]))])
    assert getattr(failing, call)(sent, **callbacks, timeout=20) is None
    assert [len(each) for each in got.values()] == [0, 1, 1]


@pytest.fixture(scope="module")
def failing() -> Iterator[Client]:
    with (
        stock_flow("clip_server", "grpc", "failing") as port,
        Client(f"grpc://0.0.0.0:{port}") as client,
    ):
        yield client


def test_our_client_inside_another_executor(onnx_server: Server) -> None:
    from clip_server.executors.documents import ClipDoc

    with stock_flow("jina", "http", "asking", SERVER=onnx_server.grpc) as port:
        sent = DocList[ClipDoc]([ClipDoc(id=f"t_{number}", text="hello") for number in range(20)])
        result = jina.Client(port=port, protocol="http").post(
            "/", sent, request_size=2, return_type=DocList[ClipDoc]
        )
    assert {document.id for document in result} == {document.id for document in sent}
    assert rows(result).shape == (20, DIM)
