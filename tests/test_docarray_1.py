"""Jina's protocol with documents of docarray 1, as clip-as-service's client speaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import SAMPLES, Server
from jina.proto import jina_pb2
from PIL import Image
from websockets.sync.client import connect

from clip_client import Client
from clip_server.gateway import docarray_1_pb2 as pb

CAT = SAMPLES / "cat.png"
Call = Callable[[pb.Request], pb.Request]


def request(endpoint: str, docs: list[pb.Document], **parameters: Any) -> pb.Request:
    header = jina_pb2.HeaderProto(request_id="1", exec_endpoint=endpoint)
    made = pb.Request(header=header.SerializeToString())
    made.parameters.update(parameters)
    made.data.docs.docs.extend(docs)
    return made


@pytest.fixture(params=["grpc", "websocket"])
def call(request: pytest.FixtureRequest, onnx_server: Server) -> Iterator[Call]:
    """Sends a request and returns its answer."""
    if request.param == "grpc":
        with onnx_server.channel() as channel:
            stream = channel.stream_stream("/jina.JinaRPC/Call")
            yield lambda made: pb.Request.FromString(
                next(iter(stream(iter([made.SerializeToString()]))))
            )
        return
    with connect(onnx_server.websocket, subprotocols=["bytes"], max_size=None) as socket:  # type: ignore[list-item]

        def ask(made: pb.Request) -> pb.Request:
            socket.send(made.SerializeToString())
            return pb.Request.FromString(socket.recv())

        yield ask


def rows(docs: Any) -> Any:
    return np.array(
        [np.frombuffer(doc.embedding.dense.buffer, doc.embedding.dense.dtype) for doc in docs]
    )


def test_encode(call: Call, onnx_server: Server) -> None:
    pixels = np.asarray(Image.open(CAT).convert("RGB"))
    dense = pb.DenseArray(buffer=pixels.tobytes(), shape=pixels.shape, dtype="|u1")
    docs = [
        pb.Document(id=b"a1", text="a cat"),
        pb.Document(id=b"b2", blob=CAT.read_bytes(), uri="cat.png"),
        pb.Document(id=b"c3", tensor=pb.Array(dense=dense, cls_name="numpy")),
    ]
    docs[0].tags.update({"page": 3})
    answer = call(request("/encode", docs))
    found = answer.data.docs.docs
    assert [doc.id for doc in found] == [b"a1", b"b2", b"c3"]
    assert (found[0].text, found[0].tags["page"], found[1].uri) == ("a cat", 3, "cat.png")
    assert found[1].blob
    assert [doc.embedding.cls_name for doc in found] == ["numpy"] * 3
    with Client(onnx_server.grpc) as client:
        expected = client.encode(["a cat", CAT, CAT])
    np.testing.assert_allclose(rows(found), expected, rtol=1e-2, atol=1e-2)
    header = jina_pb2.HeaderProto.FromString(answer.header)
    assert (header.request_id, header.status.code) == ("1", jina_pb2.StatusProto.SUCCESS)
    assert answer.routes
    (found, *_) = call(request("/", docs[1:], drop_image_content=True)).data.docs.docs
    assert not found.blob
    assert found.uri == "cat.png"


def test_rank(call: Call) -> None:
    matches = [pb.Document(id=text.encode(), text=text) for text in ("a car", "a cat", "a dog")]
    query = pb.Document(id=b"q", blob=CAT.read_bytes(), matches=matches)
    (found,) = call(request("/rank", [query])).data.docs.docs
    assert found.matches[0].text == "a cat"
    scores = [match.scores["clip_score"].value for match in found.matches]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    assert all("clip_score_cosine" in match.scores for match in found.matches)


def test_documents_below(call: Call) -> None:
    chunks = [pb.Document(id=b"c", text="a cat"), pb.Document(id=b"d", text="a dog")]
    parent = pb.Document(id=b"p", chunks=chunks)
    (found,) = call(request("/encode", [parent], access_paths="@c")).data.docs.docs
    assert not found.HasField("embedding")
    assert rows(found.chunks).shape == (2, 256)


def test_failures(call: Call) -> None:
    docs = [pb.Document(id=b"a", text="a cat"), pb.Document(id=b"b", blob=b"no image")]
    good, bad = call(request("/encode", docs)).data.docs.docs
    assert good.HasField("embedding")
    assert not bad.HasField("embedding")
    assert "not an image" in bad.tags["clip_error"]
    answer = call(request("/encode", docs, normalize=3))
    status = jina_pb2.HeaderProto.FromString(answer.header).status
    assert status.code == jina_pb2.StatusProto.ERROR
    assert "normalize" in status.description


def test_what_cannot_be_read(onnx_server: Server) -> None:
    wrong = pb.Array(dense=pb.DenseArray(buffer=b"123", shape=[2], dtype="|u1"))
    nan = pb.Document(id=b"a", text="a")
    nan.tags.update({"x": float("nan")})
    text = pb.Document(id=b"a", text="a")
    with onnx_server.channel() as channel:
        process = channel.unary_unary("/jina.JinaSingleDataRequestRPC/process_single_data")
        for made, said in (
            (request("/", [pb.Document(id=b"a", tensor=wrong)]), "the documents cannot be read"),
            (request("/", [nan]), "the documents cannot be read"),
            (request("/", [pb.Document(id=b"\xff", text="a")]), "the documents cannot be read"),
            (request("/", [text], normalize=float("inf")), "parameters hold a number"),
        ):
            with pytest.raises(grpc.RpcError) as raised:
                process(made.SerializeToString())
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert said in raised.value.details()
