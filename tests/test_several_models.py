"""Several models on one port: `model` chooses one, on every protocol."""

from __future__ import annotations

from typing import Any

import grpc
import jina
import numpy as np
import pytest
import requests
from conftest import SAMPLES, Server, Start, encode_method, flow
from docarray import DocList
from numpy.typing import NDArray
from websockets.sync.client import connect

from clip_client import Client, ServerError
from clip_client.proto import clip_pb2 as pb
from clip_server.executors.documents import ClipDoc
from clip_server.models import zoo
from clip_server.preprocess.tokenizer import tokenizer_for

CAT = SAMPLES / "cat.png"
FIRST = ("", "first", "main", "text-embedding-3-small", "embedded", "emoji-small::embedded")
SECOND = ("second", "small", "SMALL")


@pytest.fixture(scope="module")
def expected(two_models: Server) -> dict[str, NDArray[np.float32]]:
    """The embeddings of "a cat", by the executor's name."""
    with Client(two_models.grpc) as client:
        found = {name: client.encode(["a cat"], model=name)[0] for name in ("first", "second")}
    assert not np.allclose(found["first"], found["second"], rtol=1e-3)
    return found


def check(found: Any, expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_the_client_chooses_a_model(
    two_models: Server, expected: dict[str, NDArray[np.float32]], protocol: str
) -> None:
    with Client(getattr(two_models, protocol)) as client:
        for names, executor, dtype in ((FIRST, "first", "fp32"), (SECOND, "second", "int8")):
            for name in names:
                check(client.encode(["a cat"], model=name), expected[executor])
                check(client.encode(["a cat"], parameters={"model": name}), expected[executor])
                assert client.info(model=name).dtype == dtype
        first, second = (
            client.rank(CAT, ["a cat", "a car"], model=name)[0].cosine for name in ("main", "small")
        )
        assert first != second
        first, second = (
            client.classify([CAT], ["cat", "car"], model=name)[0][0].cosine
            for name in ("main", "small")
        )
        assert first != second
        for call in (
            lambda: client.encode(["a cat"], model="third"),
            lambda: client.rank(CAT, ["a cat"], model="third"),
            lambda: client.classify([CAT], ["cat"], model="third"),
            lambda: client.info(model="third"),
        ):
            with pytest.raises(ServerError, match=r"'third'.*first, .*main.*second, small"):
                call()


@pytest.mark.parametrize("names", [FIRST, SECOND])
def test_other_clients_choose_a_model(
    two_models: Server, expected: dict[str, NDArray[np.float32]], names: tuple[str, ...]
) -> None:
    of = expected["first" if names is FIRST else "second"]
    jinas = jina.Client(host="127.0.0.1", port=two_models.ports[0])
    for name in names:
        for body in ({"model": name}, {"parameters": {"model": name}}):
            answer = requests.post(f"{two_models.http}/encode", json={"data": ["a cat"], **body})
            check(answer.json()["data"][0]["embedding"], of)
        docs = DocList[ClipDoc]([ClipDoc(text="a cat")])
        found = jinas.post(
            "/encode", docs, parameters={"model": name}, return_type=DocList[ClipDoc]
        )
        check(found[0].embedding, of)
        request = pb.EncodeRequest(items=[pb.Item(text="a cat")], model=name)
        with connect(two_models.websocket) as socket:
            sent = pb.Requests(requests=[pb.Request(id=1, encode=request)])
            socket.send(sent.SerializeToString())
            (response,) = pb.Responses.FromString(socket.recv()).responses
        check(np.frombuffer(response.encode.embeddings, "<f4"), of)


def test_a_wrong_name_lists_the_right_ones(two_models: Server) -> None:
    for body in ({"model": "third"}, {"parameters": {"model_name": "third"}}):
        answer = requests.post(f"{two_models.http}/encode", json={"data": ["a cat"], **body})
        assert answer.status_code == 400
        assert "second, small" in answer.json()["error"]["message"]
    with two_models.channel() as channel:
        encode = encode_method(channel)
        with pytest.raises(grpc.RpcError, match="second, small"):
            encode(pb.EncodeRequest(items=[pb.Item(text="a cat")], model="third"))


def test_a_single_model_answers_to_its_names_alone(onnx_server: Server) -> None:
    with Client(onnx_server.grpc) as client:
        client.encode(["a cat"], model="clip")
        client.encode(["a cat"], model="emoji-small")
        with pytest.raises(ServerError, match="no model here is named 'text-embedding-3-small'"):
            client.encode(["a cat"], model="text-embedding-3-small")


def tokens_of(*texts: str) -> int:
    tokenizer = tokenizer_for(zoo.resolve("embedded").text)
    return sum(len(tokenizer.encode(text)) for text in texts)


@pytest.mark.parametrize("model", ["first", "second"])
def test_tokens_are_those_the_model_read(two_models: Server, model: str) -> None:
    """The second model caches; each text has a start and an end."""
    items = [pb.Item(text="a cat"), pb.Item(text="a cat"), pb.Item(text="a smiling cat")]
    image = pb.Item(image=CAT.read_bytes())
    long = pb.Item(text="cat " * 100)
    for _ in range(2):
        for sent, tokens in (
            ([*items, image], tokens_of("a cat", "a cat", "a smiling cat")),
            ([image], 0),
            ([long, pb.Item()], tokens_of(long.text)),
        ):
            body = pb.EncodeRequest(items=sent, model=model).SerializeToString()
            answer = requests.post(
                f"{two_models.http}/encode",
                body,
                headers={"content-type": "application/x-protobuf"},
            )
            assert pb.EncodeResponse.FromString(answer.content).tokens == tokens


@pytest.mark.slow
def test_an_alias_that_is_another_executors_name_keeps_the_flow_from_starting(start: Start) -> None:
    spec = flow("onnx", aliases=["other"])
    spec["executors"].append({**flow("onnx")["executors"][0], "name": "other"})
    server = start(spec, wait=False)
    assert server.process.wait(60) == 1
    assert "clip: the alias 'other' is a name of other as well" in server.output()
