"""What curl users send and get."""

from __future__ import annotations

import base64
import re
import socket
from typing import Any

import numpy as np
import pytest
import requests
from conftest import SAMPLES, Http, Server, Start, flow

from clip_client import Client
from clip_client.proto import clip_pb2 as pb

CAT = (SAMPLES / "cat.png").read_bytes()
CAT_URI = "data:image/png;base64," + base64.b64encode(CAT).decode()
PROTOBUF = {"content-type": "application/x-protobuf"}


def nested_entry(levels: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"text": "a"}
    for _ in range(levels):
        entry = {"text": "a", "chunks": [entry]}
    return entry


def test_encode(http: Http, onnx_server: Server) -> None:
    data = [{"text": "a cat", "id": "x"}, {"uri": CAT_URI}, "a dog",
            {"blob": base64.b64encode(CAT).decode()}]  # fmt: skip
    answer = http.post("/encode", json={"data": data}).json()["data"]
    assert answer[0]["id"] == "x"
    assert answer[0]["text"] == "a cat"
    with Client(onnx_server.grpc) as client:
        expected = client.encode(["a cat", CAT, "a dog", CAT])
    found = np.array([each["embedding"] for each in answer], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_clip_as_services_own_body(http: Http) -> None:
    body = {"data": [{"text": "hi"}], "execEndpoint": "/", "parameters": {"normalize": True}}
    embedding = http.post("/post", json=body).json()["data"][0]["embedding"]
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)
    for endpoint in ("/index", "/encode/any-model"):  # the encoder answers what no other does
        answer = http.post("/post", json={**body, "execEndpoint": endpoint}).json()
        np.testing.assert_allclose(answer["data"][0]["embedding"], embedding, rtol=1e-4, atol=1e-5)
        assert answer["header"]["execEndpoint"] == endpoint


@pytest.mark.parametrize("route", ["/encode", "/post", "/anything", "/"])
def test_the_answer_is_as_jina_has_it(http: Http, route: str) -> None:
    data = [{"text": "a cat", "id": 7, "tags": {"page": 3}}, "a dog", {"text": ""}]
    header = {"requestId": "mine"}
    parameters = {"normalize": True}
    answer = http.post(
        route, json={"data": data, "parameters": parameters, "header": header}
    ).json()
    assert answer.keys() == {"header", "parameters", "routes", "data"}
    assert answer["header"]["requestId"] == "mine"
    assert answer["parameters"] == parameters
    assert [each["executor"] for each in answer["routes"]] == ["gateway", "clip"]
    first, second, bad = answer["data"]
    assert (first["id"], first["text"], first["tags"]) == (7, "a cat", {"page": 3})
    assert len({second["id"], bad["id"], 7}) == 3
    assert "empty text" in bad["error"]


def test_entries_below_others(http: Http, onnx_server: Server) -> None:
    chunk = {"text": "a cat", "id": "c", "chunks": ["a dog"], "matches": [{"uri": CAT_URI}]}
    entry = {"text": "a bird", "chunks": [chunk, {"text": ""}], "matches": None}
    with Client(onnx_server.grpc) as client:
        bird, cat, dog, image = client.encode(["a bird", "a cat", "a dog", CAT])

    def encode(paths: str | None) -> Any:
        body = {"data": [entry, "a fish"], "parameters": {"access_paths": paths}}
        first, second = http.post("/encode", json=body).json()["data"]
        assert ("embedding" in second) == ("r" in (paths or "r"))
        return first

    def embeddings(found: Any) -> list[Any]:
        """Of the bird, the cat, the dog and the image."""
        below = found["chunks"][0]
        places = (found, below, below["chunks"][0], below["matches"][0])
        return [place.get("embedding") for place in places]

    for paths, expected in (
        (None, [bird, None, None, None]),
        ("@c", [None, cat, None, None]),
        ("@cc", [None, None, dog, None]),
        ("cm", [None, None, None, image]),
        ("@r, c,cc,r", [bird, cat, dog, None]),
        ("@m", [None] * 4),
    ):
        found = encode(paths)
        for one, other in zip(embeddings(found), expected, strict=True):
            assert (one is None) == (other is None), paths
            if one is not None:
                np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
        assert found["chunks"][0]["id"] == "c"
        assert found["chunks"][0]["chunks"][0]["text"] == "a dog"
        assert ("empty text" in found["chunks"][1].get("error", "")) == (
            "c" in (paths or "").replace("cc", "").replace("cm", "")
        )


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"text": "a", "chunks": "b"}, "chunks of an entry are not a list"),
        (nested_entry(30), "nested more than 20"),
    ],
)
def test_entries_that_cannot_be_descended(http: Http, entry: Any, says: str) -> None:
    body = {"data": [entry], "parameters": {"access_paths": "@c"}}
    answer = http.post("/encode", json=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def test_image_content_comes_back_if_asked_for(http: Http) -> None:
    blob = base64.b64encode(CAT).decode()
    data = [{"blob": blob}, {"image": blob}, {"uri": CAT_URI}, {"uri": "data:,a%20cat"}]

    def fields(**parameters: Any) -> list[set[str]]:
        answer = http.post("/encode", json={"data": data, "parameters": parameters}).json()["data"]
        for sent, found in zip(data, answer, strict=True):
            assert all(found[key] == sent[key] for key in sent.keys() & found.keys())
        return [each.keys() - {"id", "embedding"} for each in answer]

    assert fields() == [set(), set(), set(), {"uri"}]
    assert fields(drop_image_content=True) == [set()] * 4
    assert fields(drop_image_content=False) == [{"blob"}, {"image"}, {"uri"}, {"uri"}]


def test_base64_in_lines_within_a_string(http: Http) -> None:
    """As of `base64 cat.png` between quotes in a shell, though JSON allows no such line ends."""
    body = b'{"data": [{"blob": "%b"}, {"text": "two\nlines"}]}' % base64.encodebytes(CAT)
    image, text = http.post("/post", data=body).json()["data"]
    (expected,) = http.post("/encode", json={"data": [{"uri": CAT_URI}]}).json()["data"]
    np.testing.assert_allclose(image["embedding"], expected["embedding"], rtol=1e-4, atol=1e-5)
    assert text["text"] == "two\nlines"


def test_an_address_of_an_image_is_an_error_of_its_entry(http: Http) -> None:
    data = [{"text": "a cat"}, {"uri": "https://example.org/cat.png"}]
    good, bad = http.post("/post", json={"data": data, "execEndpoint": "/"}).json()["data"]
    assert "embedding" in good
    assert "only data: URIs" in bad["error"]


@pytest.mark.parametrize("data", [{"text": "a cat"}, {"docs": [{"text": "a cat"}]}])
def test_other_forms_of_data(http: Http, data: Any) -> None:
    (found,) = http.post("/encode", json={"data": data}).json()["data"]
    assert found["text"] == "a cat"


def test_endpoints_that_nobody_answers(http: Http) -> None:
    answer = http.post("/post", json={"data": ["a"], "targetExecutor": "nobody"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "NOT_FOUND"
    assert "clip" in answer.json()["error"]["message"]
    for target in ("(" * 90 + r"\w+" + ")+" * 90 + "!", r"\w?" * 80 + "!", "(.|.)" * 50, "clip #"):
        answer = http.post("/post", json={"data": ["a"], "targetExecutor": target})
        assert answer.status_code == 400
        assert "is too complex" in answer.json()["error"]["message"]
    # The encoder answers any endpoint, but what has a page of its own is none.
    assert http.post("/livez", json={"data": ["a"]}).status_code == 405
    assert http.post("/anything", data=b"", headers=PROTOBUF).status_code == 400


@pytest.mark.parametrize("field", ["execEndpoint", "targetExecutor", "header", "requestId"])
@pytest.mark.parametrize("value", [7, ["/"], "\ud83d", "x" * 2000, True])
def test_an_envelope_of_the_wrong_type(http: Http, field: str, value: Any) -> None:
    answer = http.post("/post", json={"data": ["a"], field: value})
    assert answer.status_code == 400
    assert field in answer.json()["error"]["message"]


def test_rank(http: Http) -> None:
    matches = [{"text": "a car"}, {"text": "a cat"}, {"text": ""}]
    body = {"data": [{"uri": CAT_URI, "matches": matches}]}
    ranked = http.post("/rank", json=body).json()["data"][0]["matches"]
    assert [each["text"] for each in ranked] == ["a cat", "a car", ""]
    scores = [each["scores"]["clip_score"]["value"] for each in ranked[:2]]
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    assert scores == sorted(scores, reverse=True)
    assert "empty text" in ranked[2]["error"]
    again = http.post("/post", json={**body, "execEndpoint": "/rank"})
    assert again.json()["data"][0]["matches"][0]["text"] == "a cat"


def test_more_than_a_hundred_come_back_whole(http: Http) -> None:
    data = [{"text": f"number {i}"} for i in range(250)]
    data[17] = {"uri": "file:///etc/hostname"}
    answer = http.post("/encode", json={"data": data}).json()["data"]
    assert len(answer) == 250
    assert [i for i, each in enumerate(answer) if "embedding" not in each] == [17]


def test_base64_embeddings(http: Http) -> None:
    body = {"data": ["a cat"], "parameters": {"encoding_format": "base64"}}
    packed = http.post("/encode", json=body).json()["data"][0]["embedding"]
    floats = http.post("/encode", json={"data": ["a cat"]}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(packed), "<f4"), floats, rtol=1e-5, atol=1e-6
    )


def test_truncated_texts_are_counted(http: Http) -> None:
    texts = ["cat " * 75, "cat " * 76, "a cat", "\u732b" * 100]
    assert http.post("/encode", json={"data": texts}).json()["truncated"] == 2
    body = pb.EncodeRequest(items=[pb.Item(text=text) for text in texts])
    answer = http.post("/encode", data=body.SerializeToString(), headers=PROTOBUF)
    assert pb.EncodeResponse.FromString(answer.content).truncated == 2
    assert "clip_truncated_texts_total" in http.get("/metrics").text


def test_protobuf(http: Http) -> None:
    body = pb.EncodeRequest(items=[pb.Item(text="a cat"), pb.Item(image=b"no")])
    answer = http.post("/encode", data=body.SerializeToString(), headers=PROTOBUF)
    response = pb.EncodeResponse.FromString(answer.content)
    assert (response.count, response.dim) == (2, 256)
    assert [error.index for error in response.errors] == [1]
    refused = http.post("/encode", data=b"\xff\xff\xff", headers=PROTOBUF)
    assert refused.status_code == 400
    assert pb.Error.FromString(refused.content).code == pb.Error.INVALID_ARGUMENT


def test_several_requests_in_one(http: Http) -> None:
    """Each has an answer or error of its own, and is counted by itself."""

    def counted() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        samples = (line.rpartition(" ") for line in lines if 'protocol="http"' in line)
        return {name: float(value) for name, _, value in samples if "_count" in name}

    encode = pb.EncodeRequest(items=[pb.Item(text="a cat"), pb.Item(image=b"no")])
    rank = pb.RankRequest(query=pb.Item(text="a cat"), candidates=[pb.Item(text="a dog")])
    wrong = pb.EncodeRequest(items=[pb.Item(text="a cat")], model="none")
    sent = [
        pb.Request(id=7, encode=encode, request_id="mine"),
        pb.Request(id=5, rank=rank),
        pb.Request(id=6, encode=wrong),
        pb.Request(id=8),
    ]
    before = counted()
    body = pb.Requests(requests=sent).SerializeToString()
    answer = http.post("/", data=body, headers=PROTOBUF)
    assert answer.status_code == 200
    found = {each.id: each for each in pb.Responses.FromString(answer.content).responses}
    assert sorted(found) == [5, 6, 7, 8]
    assert [error.index for error in found[7].encode.errors] == [1]
    assert found[7].request_id == "mine"
    assert len(found[5].rank.matches) == 1
    assert {found[each].error.code for each in (6, 8)} == {pb.Error.INVALID_ARGUMENT}
    grown = {name for name, value in counted().items() if value != before.get(name)}
    assert {re.findall('endpoint="(.*?)"', name)[0] for name in grown} >= {"/encode", "/rank"}
    assert not any('endpoint="/"' in name for name in grown)
    for refused in (b"\xff\xff\xff", pb.Requests(requests=[pb.Request()] * 10_001)):
        body = refused if isinstance(refused, bytes) else refused.SerializeToString()
        assert http.post("/", data=body, headers=PROTOBUF).status_code == 400


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"data": 7}', '"data" is not a list'),
        (b"{}", '"data" is not a list'),
        (b'{"data": ["a"], "parameters": 3}', '"parameters" is not an object'),
        (b'{"data": ["a"], "parameters": {"minibatch_size": "many"}}', "minibatch_size"),
        (b"[" * 5000, "not JSON"),
    ],
)
def test_bodies_that_are_refused(http: Http, body: bytes, says: str) -> None:
    answer = http.post("/encode", data=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "INVALID_ARGUMENT"
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ["/encode", "/rank", "/post"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("normalize", ["false", 1, 0, [], {}]),
        ("drop_image_content", ["true", 1]),
        ("encoding_format", ["base32", True, 7, ["base64"]]),
        ("minibatch_size", ["8", 8.5, True, -1, 2**40, [8], 1e300]),
        ("batch_size", ["8"]),
        ("access_paths", [7, "@zzz", "@", "@r,", "@" + "c" * 1000, [7]]),
        ("model_name", [7, ["a"]]),
        ("normalise", [True]),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused(
    http: Http, route: str, name: str, values: list[Any]
) -> None:
    data = [{"text": "a cat", "matches": ["a dog"]}]
    for value in values:
        answer = http.post(route, json={"data": data, "parameters": {name: value}})
        assert answer.status_code == 400, (name, value)
        assert name in answer.json()["error"]["message"]


@pytest.mark.parametrize("parameters", [[], "normalize", True, 0])
def test_parameters_that_are_no_object_are_refused(http: Http, parameters: Any) -> None:
    answer = http.post("/encode", json={"data": ["a cat"], "parameters": parameters})
    assert answer.status_code == 400
    assert '"parameters" is not an object' in answer.json()["error"]["message"]


def test_parameters_that_are_right(http: Http) -> None:
    right = {"normalize": None, "minibatch_size": 8.0, "access_paths": "@r", "batch_size": 0}
    answer = http.post("/encode", json={"data": ["a cat"], "parameters": right})
    assert "embedding" in answer.json()["data"][0]
    assert http.post("/encode", json={"data": [], "parameters": None}).status_code == 200


NESTED = b'{"a":' * 260 + b"1" + b"}" * 260


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (rb'"cut \ud83d"', "character 4"),
        (rb'{"text": "\ude00 cut"}', "half of a surrogate"),
        (rb'{"uri": "data:text/plain,\ud83d"}', "uri is not valid Unicode"),
        (b'"latin-1: caf\xe9"', "not UTF-8"),
        (b'{"text": "a dog", "tags": %b}' % NESTED, "nested more than 100 deep"),
        (b'{"text": "a dog", "tags": {"a": %b}}' % (b"[" * 900 + b"]" * 900), "nested more than"),
        (b'{"text": "a dog", "tags": ["red"]}', "tags are not an object"),
        (b'{"text": "a dog", "id": "%b"}' % (b"7" * 2000), "id is not a string or a number"),
        (b'{"text": "a dog", "id": {"a": 1}}', "id is not a string or a number"),
        (b'{"text": "a dog", "id": true}', "id is not a string or a number"),
        (rb'{"text": "a dog", "id": "\ud83d"}', "id is not valid Unicode"),
    ],
)
def test_what_is_wrong_with_an_entry_is_its_own_error(http: Http, entry: bytes, says: str) -> None:
    answer = http.post("/encode", data=b'{"data": ["a cat", %b, "a bird"]}' % entry)
    assert answer.status_code == 200
    good, bad, other = answer.json()["data"]
    assert says in bad["error"]
    assert "embedding" not in bad
    assert len(good["embedding"]) == len(other["embedding"]) == 256
    # The same as a match to be ranked, and as what others are ranked for.
    answer = http.post(
        "/rank",
        data=b'{"data": [{"text": "a cat", "matches": ["a dog", %b]}, '
        b'{"text": "a cat", "tags": %b, "matches": ["a dog"]}, {"matches": ["a dog"]}]}'
        % (entry, NESTED),
    )
    assert answer.status_code == 200
    ranked, nested, empty = answer.json()["data"]
    assert "scores" in ranked["matches"][0]
    assert says in ranked["matches"][1]["error"]
    assert "nested" in nested["error"]
    assert "the query cannot be encoded" in empty["error"]


def test_what_json_has_no_word_for_comes_back_as_null(http: Http) -> None:
    tags = b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": %b, "e": "\\ud83d", "f": "\xff"}' % (
        b"9" * 5000
    )
    body = b'{"data": [{"text": "a cat", "id": "x", "tags": %b}, {"text": "a cat"}]}' % tags
    first, second = http.post("/encode", data=body).json()["data"]
    assert first["embedding"] == second["embedding"]
    assert first["id"] == "x"
    assert [first["tags"][key] for key in "abcd"] == [None] * 4
    assert first["tags"]["e"] == "\ud83d"


@pytest.mark.parametrize("empty", ["", None])
def test_an_image_beside_an_empty_text_is_encoded(http: Http, empty: str | None) -> None:
    blob = base64.b64encode(CAT).decode()
    data = [{"uri": CAT_URI}, {"text": empty, "uri": CAT_URI}, {"text": empty, "blob": blob}]
    alone, *beside = http.post("/encode", json={"data": data}).json()["data"]
    for each in beside:
        np.testing.assert_allclose(each["embedding"], alone["embedding"], rtol=1e-4, atol=1e-5)


def test_what_is_not_there(http: Http) -> None:
    missing = http.get("/nowhere")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "NOT_FOUND"
    wrong = http.get("/encode")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "METHOD_NOT_ALLOWED"
    assert wrong.headers["allow"] == "POST"


def test_odd_entries_fail_alone(http: Http) -> None:
    data: list[Any] = [None, 3, {}, {"blob": "%%%"}, {"text": 5}, "fine"]
    answer = http.post("/encode", json={"data": data}).json()["data"]
    assert ["embedding" in each for each in answer] == [False] * 5 + [True]


def test_a_body_over_the_limit(http: Http) -> None:
    def endless() -> Any:
        for _ in range(140):
            yield bytes(1 << 20)

    try:
        answer = http.post("/encode", data=endless())
        assert answer.status_code == 413
        assert "128 MiB" in answer.json()["error"]["message"]
    except requests.ConnectionError:
        pass  # the server hung up while the rest was under way, as it may
    assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET /livez HTTP/1.1\r\nx: ",
        b"GET /",
        b"POST /encode HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ",
    ],
)
def test_headers_without_end(onnx_server: Server, beginning: bytes) -> None:
    with socket.create_connection(("127.0.0.1", onnx_server.ports[1]), 10) as connection:
        answer = b""
        try:
            connection.sendall(beginning)
            for _ in range(1000):
                connection.sendall(b"x" * 1000)
            answer = connection.recv(1000)
        except ConnectionError:
            return  # the server hung up while the rest was under way, as it may
    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))


def test_other_pages(http: Http) -> None:
    assert "POST /encode" in http.get("/").json()["endpoints"]
    assert http.get("/livez").json() == {"status": "alive"}
    assert http.get("/readyz").json() == {"status": "ready"}
    info = http.get("/info").json()
    assert info["model"] == "emoji-small::embedded"
    assert info["dim"] == 256
    lost = http.get("/status")
    assert lost.status_code == 404
    assert "POST /encode" in lost.json()["error"]["message"]
    assert http.get("/encode").status_code == 405
    # Nothing on the page of another site may read the answers unless the flow says so.
    assert "access-control-allow-origin" not in http.get("/info").headers


def test_cors_one_protocol_and_limits(start: Start) -> None:
    spec = flow("onnx", max_item_bytes=100, max_request_items=3, access_paths="@r,c")
    port = spec["with"]["port"][1]
    spec["with"] = {"protocol": "http", "port": port, "cors": True, "max_request_bytes": 1000}
    server = start(spec)
    assert "0.0.0.0" in server.output()
    answer = requests.post(
        f"http://127.0.0.1:{port}/encode",
        json={"data": ["a"]},
        headers={"origin": "http://example.org"},
    )
    assert answer.headers["access-control-allow-origin"] == "*"
    asked = {"origin": "http://example.org", "access-control-request-method": "POST",
             "access-control-request-headers": "authorization, content-type"}  # fmt: skip
    allowed = requests.options(f"http://127.0.0.1:{port}/post", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] in ("*", "http://example.org")
    assert allowed.headers["access-control-allow-headers"] == "authorization, content-type"
    assert allowed.headers["access-control-allow-credentials"] == "true"
    url = f"http://127.0.0.1:{port}"
    info = requests.get(f"{url}/info").json()
    assert info["max_request_bytes"] == 1000
    assert requests.post(f"{url}/encode", json={"data": ["a" * 1000]}).status_code == 413
    assert requests.post(f"{url}/encode", json={"data": ["a"] * 4}).status_code == 400
    (one, other) = requests.post(f"{url}/encode", json={"data": ["a " * 99, "b"]}).json()["data"]
    assert "at most" in one["error"]
    assert "embedding" in other
    # The flow's own access paths, and those of a request.
    body: dict[str, Any] = {"data": [{"text": "a", "chunks": ["b", "c"]}]}
    (nested,) = requests.post(f"{url}/encode", json=body).json()["data"]
    assert all("embedding" in each for each in (nested, *nested["chunks"]))
    body["parameters"] = {"access_paths": "@r"}
    (nested,) = requests.post(f"{url}/encode", json=body).json()["data"]
    assert not any("embedding" in each for each in nested["chunks"])
    server.stop()
