"""A Jina client on the gRPC port."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client

jina = pytest.importorskip("jina")

CAT = (SAMPLES / "cat.png").read_bytes()


@pytest.fixture
def post(onnx_server: Server) -> Any:
    from docarray import DocList

    from clip_server.executors.documents import ClipDoc

    client = jina.Client(port=onnx_server.ports[0], host="127.0.0.1")

    def post(docs: list[Any], on: str = "/encode", **parameters: Any) -> Any:
        return client.post(
            on,
            DocList[ClipDoc](docs),
            return_type=DocList[ClipDoc],
            parameters=parameters,
            results_in_order=True,
        )

    return post


def test_encode(post: Any, onnx_server: Server) -> None:
    from clip_server.executors.documents import ClipDoc

    uri = f"data:image/png;name=my%20cat.png;base64,{base64.encodebytes(CAT).decode()}"
    docs = post(
        [
            *(ClipDoc(text="a cat"), ClipDoc(blob=CAT)),
            *(ClipDoc(), ClipDoc(uri="file:///etc/passwd")),
            *(ClipDoc(text="", uri=uri), ClipDoc(uri="data:,a%20cat")),
        ]
    )
    with Client(onnx_server.grpc) as client:
        expected = client.encode(["a cat", CAT, CAT, "a cat"])
    found = np.stack([docs[place].embedding for place in (0, 1, 4, 5)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert "empty document" in docs[2].error
    assert "only data: URIs" in docs[3].error
    assert docs[1].blob == CAT


def test_parameters(post: Any) -> None:
    from docarray import DocList

    from clip_server.executors.documents import ClipChunk, ClipDoc, ClipMatch

    def tree() -> Any:
        return ClipDoc(
            text="above",
            blob=b"",
            chunks=DocList[ClipChunk]([ClipChunk(text="a cat"), ClipChunk(blob=CAT)]),
            matches=DocList[ClipMatch]([ClipMatch(text="a dog")]),
        )

    (doc,) = post([tree()], access_paths="@c", normalize=True, drop_image_content=True)
    assert doc.embedding is None
    assert [np.linalg.norm(chunk.embedding) for chunk in doc.chunks] == pytest.approx([1, 1])
    assert doc.chunks[1].blob is None
    assert doc.matches[0].embedding is None
    (doc,) = post([tree()], on="/", access_paths="@r,m", batch_size=1)
    assert doc.embedding.shape == (256,)
    assert doc.matches[0].embedding.shape == (256,)
    assert doc.chunks[0].embedding is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"normalize": "false"},
        {"drop_image_content": 1},
        {"minibatch_size": "8"},
        {"minibatch_size": True},
        {"access_paths": 7},
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused(post: Any, wrong: dict[str, Any]) -> None:
    from clip_server.executors.documents import ClipDoc

    with pytest.raises(Exception, match=next(iter(wrong))):
        post([ClipDoc(text="a")], **wrong)
    # Another executor's parameters pass unread.
    (doc,) = post([ClipDoc(text="a")], index="photos")
    assert doc.embedding.shape == (256,)


def test_rank(post: Any) -> None:
    from docarray import DocList

    from clip_server.executors.documents import ClipDoc, ClipMatch

    matches = [ClipMatch(text="a car"), ClipMatch(text="a cat"), ClipMatch(blob=b"no picture")]
    (doc,) = post([ClipDoc(blob=CAT, matches=DocList[ClipMatch](matches))], on="/rank")
    assert [match.text for match in doc.matches] == ["a cat", "a car", None]
    assert doc.matches[0].scores["clip_score"] > 0.5
    assert doc.matches[0].scores["clip_score_cosine"] > doc.matches[1].scores["clip_score_cosine"]
    assert doc.matches[2].error


def test_an_error_shows_nothing_of_the_server(post: Any) -> None:
    from clip_server.executors.documents import ClipDoc

    with pytest.raises(Exception, match="access_paths") as raised:
        post([ClipDoc(text="a")], access_paths="@zzz")
    said = str(raised.value)
    assert "Traceback" not in said
    assert ".py" not in said


def test_more_than_one_request(post: Any) -> None:
    from clip_server.executors.documents import ClipDoc

    docs = post([ClipDoc(text=f"number {i}") for i in range(250)])
    assert len(docs) == 250
    assert [doc.text for doc in docs] == [f"number {i}" for i in range(250)]
    assert all(doc.embedding is not None for doc in docs)


def test_answers_that_come_before_the_end_of_the_requests(onnx_server: Server) -> None:
    """As under load: the client says that it has no more only after all answers are there."""
    from docarray import DocList
    from jina.clients.request import request_generator
    from jina.proto import jina_pb2_grpc

    from clip_server.executors.documents import ClipDoc

    made = [
        next(request_generator("/encode", DocList[ClipDoc]([ClipDoc(text=f"number {i}")])))
        for i in range(3)
    ]
    answered = threading.Semaphore(0)

    def requests() -> Iterator[Any]:
        for request in made:
            yield request
            assert answered.acquire(timeout=30)

    with grpc.insecure_channel(f"127.0.0.1:{onnx_server.ports[0]}") as channel:
        call = jina_pb2_grpc.JinaRPCStub(channel).Call
        metadata = [("__results_in_order__", "true")]
        answers = []
        for answer in call(requests(), metadata=metadata, timeout=60):
            answers.append(answer)
            answered.release()
    assert [answer.docs[0].text for answer in answers] == [f"number {i}" for i in range(3)]


def test_grpc_health_and_reflection(onnx_server: Server) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(f"127.0.0.1:{onnx_server.ports[0]}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "clip.v1.Clip", "jina.JinaRPC"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(requests)
        names = {service.name for service in answer.list_services_response.service}
        assert "clip.v1.Clip" in names
