"""Flows with executors besides the encoder, and with several encoders."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import requests
from conftest import SAMPLES, Server, Start, encode_method, eventually, flow

from clip_client import Client, ServerError
from clip_client.proto import clip_pb2 as pb

jina = pytest.importorskip("jina")

# Jina's WebSocket client leaves its connection open when it raises.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HERE = Path(__file__).parent
CAT = (SAMPLES / "cat.png").read_bytes()
PROTOCOLS = ("grpc", "http", "websocket")


def executor(name: str, jtype: str, module: str) -> dict[str, Any]:
    uses = {"jtype": jtype, "metas": {"py_modules": [str(HERE / module)]}}
    return {"name": name, "uses": uses}


@pytest.fixture(scope="module")
def around(start: Start) -> Server:
    """The encoder between an executor without annotations and one with a class of its own."""
    spec = flow()
    before = executor("lowercase", "Lowercase", "flow_executors.py")
    behind = executor("indexer", "Indexer", "flow_executors.py")
    spec["executors"] = [before, *spec["executors"], behind]
    return start(spec)


@pytest.fixture(scope="module")
def branches(start: Start) -> Server:
    """An executor beside the encoder, and one that waits for both."""
    spec = flow()
    beside = {**executor("length", "Length", "flow_executors.py"), "needs": "gateway"}
    join = {**executor("join", "Join", "flow_executors.py"), "needs": ["clip", "length"]}
    spec["executors"] += [beside, join]
    return start(spec)


@pytest.fixture(scope="module")
def two_encoders(start: Start) -> Server:
    """The second gives ones, and has two replicas."""
    spec = flow()
    second = executor("second", "CLIPEncoder", "slow_executor.py")
    spec["executors"].append({**second, "replicas": 2})
    return start(spec)


def jina_post(server: Server, protocol: str, on: str, docs: list[Any], **options: Any) -> Any:
    from docarray import DocList

    from clip_server.executors.documents import ClipDoc

    port = server.ports[PROTOCOLS.index(protocol)]
    return jina.Client(host="127.0.0.1", port=port, protocol=protocol).post(
        on, DocList[ClipDoc](docs), return_type=DocList[ClipDoc], **options
    )


def doc(**fields: Any) -> Any:
    from clip_server.executors.documents import ClipDoc

    return ClipDoc(**fields)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_our_client_gets_the_answer_of_the_whole_flow(
    around: Server, onnx_server: Server, protocol: str
) -> None:
    with Client(onnx_server.grpc) as plain, Client(getattr(around, protocol)) as client:
        expected = plain.encode(["a cat", CAT, "a cat"]) / 2
        # Of two equal items each has its own place.
        found = client.encode(["A CAT", CAT, "A CAT"])
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        unit = client.encode(["A CAT"], normalize=True)
        assert np.linalg.norm(unit) == pytest.approx(0.5, abs=1e-4)
        # An item that fails does so alone, though its error did not cross the indexer's class.
        embeddings, errors = client.encode(["a cat", b"no image"], on_item_error="return")
        np.testing.assert_allclose(embeddings[0], expected[0], rtol=1e-4, atol=1e-5)
        assert [error.index for error in errors] == [1]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_jina_client_gets_the_answer_of_the_whole_flow(
    around: Server, onnx_server: Server, protocol: str
) -> None:
    with Client(onnx_server.grpc) as plain:
        expected = plain.encode(["a cat"])[0]
    (found,) = jina_post(around, protocol, "/encode", [doc(text="A CAT", id="one")])
    np.testing.assert_allclose(found.embedding, expected / 2, rtol=1e-4, atol=1e-5)
    assert (found.id, found.text, found.tags) == ("one", "a cat", {"encoded": True})
    # An endpoint of the indexer alone: the encoder answers every endpoint before it.
    first, second = jina_post(
        around, protocol, "/index", [doc(text="a cat", id="x"), doc(text="a dog", id="y")]
    )
    np.testing.assert_allclose(first.embedding, expected, rtol=1e-4, atol=1e-5)
    assert second.tags["rows"] == 2
    kept = jina_post(around, protocol, "/filter", [doc(text="keep"), doc(text="drop")])
    assert [each.text for each in kept] == ["keep"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_executor_that_fails_is_named_and_shows_nothing_of_the_server(
    around: Server, protocol: str
) -> None:
    with pytest.raises(Exception, match="executor indexer failed") as raised:
        jina_post(around, protocol, "/fail", [doc(text="a")])
    assert not re.search(r"secret|OSError|Traceback|\.py", str(raised.value))
    with pytest.raises(Exception, match="the index is empty"):
        jina_post(around, protocol, "/refuse", [doc(text="a")])


@pytest.mark.slow
def test_branches_of_a_flow_are_joined(branches: Server, onnx_server: Server) -> None:
    with Client(onnx_server.grpc) as plain, Client(branches.grpc) as client:
        expected = plain.encode(["a cat", CAT]) * 2
        np.testing.assert_allclose(client.encode(["a cat", CAT]), expected, rtol=1e-4, atol=1e-4)
    found = jina_post(branches, "grpc", "/encode", [doc(text="a cat"), doc(blob=CAT)])
    np.testing.assert_allclose([each.embedding for each in found], expected, rtol=1e-4, atol=1e-4)
    assert [each.tags for each in found] == [
        {"length": len("a cat"), "encoded": True},
        {"length": len(CAT), "encoded": True},
    ]
    assert found[1].blob == CAT


def test_an_executor_by_its_name(around: Server) -> None:
    """As Jina does it: the others are passed by."""
    (found,) = jina_post(around, "grpc", "/index", [doc(text="a")], target_executor="indexer")
    assert found.embedding is None
    assert found.tags["rows"] > 0
    for target in ("nobody", "("):
        with pytest.raises(Exception, match="target_executor"):
            jina_post(around, "grpc", "/index", [doc(text="a")], target_executor=target)


def test_json_gets_the_answer_of_the_whole_flow(around: Server, onnx_server: Server) -> None:
    """As with curl: other executors see every field of an entry, and theirs come back."""
    with Client(onnx_server.grpc) as plain:
        expected = plain.encode(["a cat", CAT])
    blob = base64.b64encode(CAT).decode()
    entries = [{"text": "A CAT", "id": "one", "tags": {"page": 3}}, {"blob": blob}]
    for path, on in (("/post", "/encode"), ("/encode", None)):
        answer = post_json(around, path, entries, execEndpoint=on)
        found, image = answer["data"]
        np.testing.assert_allclose(found["embedding"], expected[0] / 2, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(image["embedding"], expected[1] / 2, rtol=1e-4, atol=1e-5)
        assert (found["id"], found["text"]) == ("one", "a cat")
        assert found["tags"] == {"page": 3, "encoded": True}
        names = [route["executor"] for route in answer["routes"]]
        assert names == ["gateway", "lowercase", "clip", "indexer"]
    entries[1:] = [{"image": "%%%"}, {"blob": f"data:image/png;base64,{blob}"}]
    as_base64, bad, image = post_json(
        around, "/encode", entries, parameters={"encoding_format": "base64"}
    )["data"]
    assert bad["embedding"] is None
    assert len(image["embedding"]) == len(as_base64["embedding"])
    packed = np.frombuffer(base64.b64decode(as_base64["embedding"]), "<f4")
    np.testing.assert_allclose(packed, expected[0] / 2, rtol=1e-4, atol=1e-5)
    kept = post_json(around, "/filter", ["keep", "drop"])["data"]
    assert [each["text"] for each in kept] == ["keep"]
    (indexed,) = post_json(around, "/index", [{"text": "a"}], targetExecutor="indexer")["data"]
    assert "embedding" not in indexed or indexed["embedding"] is None
    matches = [{"text": "a car"}, {"text": "a cat"}]
    (ranked,) = post_json(around, "/rank", [{"blob": blob, "matches": matches}])["data"]
    assert [match["text"] for match in ranked["matches"]] == ["a cat", "a car"]
    assert ranked["matches"][0]["scores"]["clip_score"]["value"] > 0.5


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/fail", {"data": ["a"]}, 500, "executor indexer failed"),
        ("/refuse", {"data": ["a"]}, 400, "the index is empty"),
        ("/encode", {"data": [{"text": "a", "tags": "red"}]}, 400, "tags"),
        ("/encode", {"data": [{"text": "a", "tags": {"a": [[[[]]]] * 9}}] * 10_001}, 400, "10,000"),
        ("/encode", {"data": [7]}, 400, "is not an object"),
        ("/encode", {"data": ["\ud83d"]}, 400, "surrogates"),
        ("/index", {"data": ["a"], "targetExecutor": "nobody"}, 404, "indexer"),
        ("/nowhere", {"data": ["a"], "targetExecutor": "indexer"}, 404, "/nowhere"),
        ("/index", {"data": ["a"], "targetExecutor": "("}, 400, "regular expression"),
    ],
)
def test_json_that_the_flow_refuses(
    around: Server, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    answer = requests.post(f"{around.http}{path}", json=body, timeout=60)
    assert answer.status_code == status, answer.text
    said = answer.json()["error"]["message"]
    assert says in said
    assert not re.search(r"secret|OSError|Traceback|\.py", said)


def post_json(server: Server, path: str, entries: list[Any], **fields: Any) -> Any:
    answer = requests.post(f"{server.http}{path}", json={"data": entries, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_ids_and_tags_reach_the_executors(around: Server) -> None:
    item = pb.Item(text="A CAT", id="mine")
    item.tags.update({"page": 3})
    with around.channel() as channel:
        encode = encode_method(channel)
        answer = encode(pb.EncodeRequest(items=[item, item]))
        assert (answer.count, answer.dim, len(answer.errors)) == (2, 256, 0)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_first_of_several_encoders_answers(
    two_encoders: Server, onnx_server: Server, protocol: str
) -> None:
    with Client(getattr(two_encoders, protocol)) as client, Client(onnx_server.grpc) as plain:
        np.testing.assert_allclose(
            client.encode(["a cat"]), plain.encode(["a cat"]), rtol=1e-4, atol=1e-5
        )
        assert client.info().runtime == "onnx"


def test_an_encoder_by_its_name(two_encoders: Server) -> None:
    with two_encoders.channel() as channel:
        encode = encode_method(channel)
        answer = encode(pb.EncodeRequest(items=[pb.Item(text="a")], model="second"))
        assert set(np.frombuffer(answer.embeddings, "<f4")) == {1.0}
        # Both serve this model, so it is the first one's name as well.
        answer = encode(pb.EncodeRequest(items=[pb.Item(text="a")], model="Emoji-Small"))
        assert len(set(np.frombuffer(answer.embeddings, "<f4"))) > 100
        with pytest.raises(grpc.RpcError) as raised:
            encode(pb.EncodeRequest(items=[pb.Item(text="a")], model="third"))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "second" in raised.value.details()
    for protocol in PROTOCOLS:
        for on, options in (
            ("/encode", {"target_executor": "second"}),
            ("/encode/second", {}),
            ("/", {"parameters": {"model_name": "second"}}),
        ):
            (found,) = jina_post(two_encoders, protocol, on, [doc(text="a")], **options)
            assert set(found.embedding) == {1.0}
        (found,) = jina_post(two_encoders, protocol, "/encode", [doc(text="a")])
        assert len(set(found.embedding)) > 100


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_encoder_by_its_name_from_the_client(two_encoders: Server, protocol: str) -> None:
    second: dict[str, Any] = {"parameters": {"model_name": "second"}}
    with Client(getattr(two_encoders, protocol)) as client:
        assert np.unique(client.encode(["a", "b"], **second)) == [1]
        (ranking, _) = client.rank("a", ["b", "c"], **second)
        assert ranking.cosine == pytest.approx(1)
        assert len(np.unique(client.encode(["a"]))) > 100
        assert client.info(model="second").runtime != client.info().runtime
        with pytest.raises(ServerError, match="no model here is named 'third'"):
            client.encode(["a"], parameters={"model_name": "third"})


def test_calls_one_after_the_other_go_round(two_encoders: Server) -> None:
    def requests_by_replica() -> list[float]:
        text = requests.get(f"{two_encoders.http}/metrics").text
        return [
            float(each) for each in re.findall(r"^clip_requests_total\{.*\} (\S+)$", text, re.M)
        ]

    before = requests_by_replica()
    body = pb.EncodeRequest(items=[pb.Item(text="a")], model="second").SerializeToString()
    for _ in range(6):
        answer = requests.post(
            f"{two_encoders.http}/encode",
            body,
            headers={"content-type": "application/x-protobuf"},
        )
        assert answer.status_code == 200
    assert eventually(lambda: sum(requests_by_replica()) == sum(before) + 6)
    after = requests_by_replica()
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [0, 3, 3]
