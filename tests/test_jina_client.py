"""A Jina client on the gRPC port."""

from __future__ import annotations

import base64
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import SAMPLES, Server

from clip_client import Client
from clip_client.proto import clip_pb2 as pb

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

    with onnx_server.channel() as channel:
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

    with onnx_server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "clip.v1.Clip", "jina.JinaRPC"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        (answer,) = stub.ServerReflectionInfo(requests)
        names = {service.name for service in answer.list_services_response.service}
        assert "clip.v1.Clip" in names


METHODS = (
    "clip.v1.Clip/Encode",
    "clip.v1.Clip/Rank",
    "clip.v1.Clip/Info",
    "jina.JinaSingleDataRequestRPC/process_single_data",
    "jina.JinaGatewayDryRunRPC/dry_run",
    "jina.JinaDiscoverEndpointsRPC/endpoint_discovery",
)


def ask(server: Server, method: str, message: bytes) -> bytes:
    """The answer to a serialized message, as a call of its own or as a stream of one."""
    with server.channel() as channel:
        if method.endswith("/Call"):
            (answer,) = channel.stream_stream(f"/{method}")(iter([message]), timeout=30)
            return bytes(answer)
        return bytes(channel.unary_unary(f"/{method}")(message, timeout=30))


def refusal(server: Server, method: str, message: bytes) -> str:
    """What INVALID_ARGUMENT says."""
    with pytest.raises(grpc.RpcError) as raised:
        ask(server, method, message)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    said: str = raised.value.details()
    assert not re.search(r"<class|Traceback|\.py", said)
    return said


def data_request(on: str = "/encode", **fields: Any) -> Any:
    from docarray import DocList
    from jina.proto import jina_pb2

    from clip_server.executors.documents import ClipDoc

    request = jina_pb2.DataRequestProto()
    request.header.exec_endpoint = on
    request.data.docs.CopyFrom(DocList[ClipDoc]([ClipDoc(text="a", **fields)]).to_protobuf())
    return request


@pytest.mark.parametrize("method", [*METHODS, "jina.JinaRPC/Call"])
def test_a_message_that_cannot_be_decoded(onnx_server: Server, method: str) -> None:
    assert "is not a serialized" in refusal(onnx_server, method, b"\xff\xff\xff")


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("method", [METHODS[3], "jina.JinaRPC/Call"])
def test_parameters_that_are_not_finite(onnx_server: Server, method: str, number: float) -> None:
    request = data_request()
    request.parameters.update({"others": [{"threshold": number}]})
    assert "not finite" in refusal(onnx_server, method, request.SerializeToString())


@pytest.mark.parametrize("method", [METHODS[3], "jina.JinaRPC/Call"])
@pytest.mark.parametrize(
    ("field", "node", "says"),
    [
        ("tags", {"text": "red"}, "tags: value is not a valid dict"),
        ("text", {"blob": b"\xff"}, "text: "),
        ("matches", {"text": "a"}, "not those that the executor reads"),
        ("embedding", {"ndarray": {"dense": {"buffer": b"abc", "dtype": "<f4"}}}, "reads"),
    ],
)
def test_documents_that_the_encoder_cannot_read(
    onnx_server: Server, method: str, field: str, node: Any, says: str
) -> None:
    from docarray.proto import NodeProto
    from jina.proto import jina_pb2

    request = data_request()
    request.data.docs.docs[0].data[field].CopyFrom(NodeProto(**node))
    answer = ask(onnx_server, method, request.SerializeToString())
    status = jina_pb2.DataRequestProto.FromString(answer).header.status
    assert status.code == jina_pb2.StatusProto.ERROR
    assert says in status.description
    assert not re.search(r"<class|Traceback|\.py", status.description)
    # A client's fault is none of the server's log.
    assert "Traceback" not in onnx_server.output()


@pytest.mark.parametrize("on", ["/\x1aank", "/\u00e9", "/" + "a" * 10_000])
def test_an_endpoint_that_is_none(post: Any, on: str) -> None:
    from clip_server.executors.documents import ClipDoc

    with pytest.raises(Exception, match="the endpoint"):
        post([ClipDoc(text="a")], on=on)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_websocket(onnx_server: Server) -> None:
    """Callbacks, order and sizes as over gRPC; clip.v1's clients are told apart."""
    import asyncio

    from docarray import DocList

    from clip_server.executors.documents import ClipDoc

    client = jina.Client(host="127.0.0.1", port=onnx_server.ports[2], protocol="websocket")
    assert client.is_flow_ready()
    docs = DocList[ClipDoc](ClipDoc(text=f"number {i}") for i in range(95))
    sizes: list[int] = []
    client.post(
        "/encode",
        docs,
        return_type=DocList[ClipDoc],
        request_size=10,
        parameters={"normalize": True},
        on_done=lambda response: sizes.append(len(response.docs)),
    )
    assert sorted(sizes) == [5, *[10] * 9]
    found = client.post(
        "/", docs, return_type=DocList[ClipDoc], request_size=10, results_in_order=True
    )
    assert [doc.text for doc in found] == [doc.text for doc in docs]
    assert np.isfinite([doc.embedding for doc in found]).all()

    async def encode() -> int:
        async_client = jina.Client(
            host="127.0.0.1", port=onnx_server.ports[2], protocol="websocket", asyncio=True
        )
        answers = async_client.post("/encode", docs, return_type=DocList[ClipDoc])
        return sum([len(answer) async for answer in answers])

    assert asyncio.run(encode()) == 95
    failed: list[str] = []
    client.post(
        "/encode",
        docs,
        parameters={"normalize": "no"},
        on_error=lambda response: failed.append(response.header.status.description),
    )
    assert "normalize" in failed[0]
    with pytest.raises(Exception, match="not finite"):
        client.post("/encode", docs, parameters={"x": math.nan})
    with Client(onnx_server.websocket) as ours:
        expected = ours.encode(["number 0"])[0]
    np.testing.assert_allclose(found[0].embedding, expected, rtol=1e-4, atol=1e-5)


def test_clients_that_go_away_leave_nothing_in_the_log(onnx_server: Server) -> None:
    import socket

    from websockets.sync.client import connect

    texts = [pb.Item(text=f"text {number}") for number in range(300)]
    encode = pb.EncodeRequest(items=texts)
    stream = pb.Requests(requests=[pb.Request(id=1, encode=encode)]).SerializeToString()
    jina_request = data_request().SerializeToString()
    with onnx_server.channel() as channel:
        calls = [
            channel.unary_unary("/clip.v1.Clip/Encode").future(encode.SerializeToString()),
            channel.stream_stream("/clip.v1.Clip/Stream")(iter([stream])),
            channel.unary_unary(f"/{METHODS[3]}").future(jina_request),
            channel.stream_stream("/jina.JinaRPC/Call")(iter([jina_request])),
        ]
        for call in calls:
            call.cancel()
    for subprotocols, message in ((None, stream), (["bytes"], jina_request)):
        with connect(onnx_server.websocket, subprotocols=subprotocols, proxy=None) as connection:
            connection.send(message)
            connection.socket.shutdown(socket.SHUT_RDWR)
    with Client(onnx_server.grpc) as client:  # and the server serves on
        assert client.encode(["a cat"]).shape == (1, 256)
    assert "Traceback" not in onnx_server.output()
