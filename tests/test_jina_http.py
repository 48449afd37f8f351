"""A Jina client on the HTTP port."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client

jina = pytest.importorskip("jina")

CAT = (SAMPLES / "cat.png").read_bytes()
CAT_URI = f"data:image/png;base64,{base64.b64encode(CAT).decode()}"


def documents(*fields: dict[str, Any]) -> Any:
    from docarray import DocList

    from clip_server.executors.documents import ClipDoc

    return DocList[ClipDoc](ClipDoc(**each) for each in fields)


def post(server: Server, docs: Any, on: str = "/encode", **options: Any) -> Any:
    client = jina.Client(host=server.http)
    return client.post(on, docs, return_type=type(docs), results_in_order=True, **options)


def test_contents_come_back_with_embeddings(onnx_server: Server) -> None:
    with Client(onnx_server.grpc) as client:
        expected = client.encode(["a cat", CAT, CAT])
    blob = base64.b64encode(CAT)
    sent = documents(
        {"text": "a cat", "id": "one", "tags": {"page": 3}},
        {"uri": CAT_URI},
        {"blob": blob},
        {"uri": "file:///etc/hostname"},
        {},
    )
    found = post(onnx_server, sent)
    np.testing.assert_allclose(
        np.stack([doc.embedding for doc in found[:3]]), expected, rtol=1e-3, atol=1e-4
    )
    assert found[0].embedding.dtype.kind == "f"
    assert [doc.id for doc in found] == [doc.id for doc in sent]
    assert (found[0].text, found[0].tags) == ("a cat", {"page": 3})
    assert (found[1].uri, found[2].blob) == (CAT_URI, blob)
    assert "only data: URIs" in found[3].error
    assert found[4].embedding is None
    assert found[4].error


def test_parameters(onnx_server: Server) -> None:
    from docarray import DocList

    from clip_server.executors.documents import ClipChunk

    (sent,) = documents({"text": "above"})
    sent.chunks = DocList[ClipChunk]([ClipChunk(text="a cat"), ClipChunk(uri=CAT_URI)])
    parameters = {
        "access_paths": "@c",
        "normalize": True,
        "drop_image_content": True,
        "batch_size": 8,
        "index": "photos",  # of another executor
    }
    (found,) = post(onnx_server, documents(vars(sent)), on="/", parameters=parameters)
    assert found.embedding is None
    norms = [np.linalg.norm(chunk.embedding) for chunk in found.chunks]
    assert norms == pytest.approx([1, 1], abs=1e-5)
    assert found.chunks[1].uri is None
    with pytest.raises(Exception, match="normalize"):
        post(onnx_server, documents({"text": "a"}), parameters={"normalize": "false"})


def test_rank(onnx_server: Server) -> None:
    from docarray import DocList

    from clip_server.executors.documents import ClipMatch

    texts = ("a car", "a cat", "")
    matches = DocList[ClipMatch]([ClipMatch(text=text) for text in texts])
    (found,) = post(onnx_server, documents({"uri": CAT_URI, "matches": matches}), on="/rank")
    assert [match.text for match in found.matches] == ["a cat", "a car", ""]
    best, second, bad = found.matches
    assert best.scores["clip_score"] > second.scores["clip_score"]
    assert best.scores["clip_score_cosine"] > second.scores["clip_score_cosine"]
    assert "empty text" in bad.error


def test_many_requests_and_callbacks(onnx_server: Server) -> None:
    sent = documents(*({"text": f"number {number}"} for number in range(90)))
    with Client(onnx_server.grpc) as client:
        expected = client.encode([doc.text for doc in sent])
    found = post(onnx_server, sent, on="/anything", request_size=20)
    assert [doc.text for doc in found] == [doc.text for doc in sent]
    np.testing.assert_allclose([doc.embedding for doc in found], expected, rtol=1e-3, atol=1e-4)
    answers: list[Any] = []
    post(onnx_server, sent, request_size=45, on_done=answers.append)
    assert sorted(len(answer.docs) for answer in answers) == [45, 45]
    for answer in answers:
        assert answer.header.exec_endpoint == "/encode"
        assert [route.executor for route in answer.routes] == ["gateway", "clip"]


def test_async_and_readiness(onnx_server: Server) -> None:
    sent = documents({"text": "a cat"}, {"text": "a dog"})

    async def encode() -> list[Any]:
        client = jina.Client(
            host="127.0.0.1", port=onnx_server.ports[1], protocol="http", asyncio=True
        )
        assert await client.is_flow_ready()
        answers = client.post("/encode", sent, request_size=1, return_type=type(sent))
        return [doc async for docs in answers for doc in docs]

    found = asyncio.run(encode())
    assert {doc.text for doc in found} == {"a cat", "a dog"}
    assert all(doc.embedding.shape == (256,) for doc in found)
    assert jina.Client(host=onnx_server.http).is_flow_ready()


def test_an_endpoint_that_nobody_answers(onnx_server: Server) -> None:
    with pytest.raises(Exception, match="no such endpoint"):
        post(onnx_server, documents({"text": "a"}), target_executor="nobody")
