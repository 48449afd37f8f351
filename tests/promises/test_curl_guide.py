"""The guide's page on plain HTTP, sentence by sentence: JSON as curl sends it and jq reads it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from conftest import Http, Server
from guide import CAT, DIM, DOG, SENTENCES, data_uri

from clip_client import Client

# As `base64 FILE` prints it: in lines.
LINES = base64.encodebytes(CAT.read_bytes()).decode()
BLOB = base64.b64encode(CAT.read_bytes()).decode()


@pytest.fixture(scope="module")
def expected(onnx_server: Server) -> Any:
    with Client(onnx_server.grpc) as client:
        return client.encode([*SENTENCES, CAT])


def post(http: Http, data: list[Any], on: str = "/", **others: Any) -> Any:
    """The answer to a body for `/post`."""
    answer = http.post("/post", json={"data": data, "execEndpoint": on, **others})
    assert answer.status_code == 200, answer.text
    return answer.json()


def entries(**fields: list[Any]) -> list[dict[str, Any]]:
    """[{"text": "a"}, {"text": "b"}] from text=["a", "b"]."""
    return [{name: value} for name, values in fields.items() for value in values]


def rows(answer: Any) -> Any:
    return np.array([entry["embedding"] for entry in answer], np.float32)


def test_sentences_are_encoded_at_post(http: Http, expected: Any) -> None:
    answer = post(http, entries(text=SENTENCES))
    np.testing.assert_allclose(rows(answer["data"]), expected[:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blob", [BLOB, LINES], ids=["one line", "lines"])
def test_a_local_image_is_a_blob_in_base64(http: Http, expected: Any, blob: str) -> None:
    answer = post(http, entries(text=["First do it"], blob=[blob]))
    np.testing.assert_allclose(rows(answer["data"]), expected[[0, 3]], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_curl_with_the_quotes_of_the_guide(onnx_server: Server, expected: Any) -> None:
    command = (
        f"curl -s -X POST {onnx_server.http}/post -H 'Content-Type: application/json' "
        """-d '{"data":[{"text": "First do it"}, {"blob":"'"$( base64 -w 0 """
        f"""{CAT}"""
        """)"'" }], "execEndpoint":"/"}'"""
    )
    said = subprocess.run(command, shell=True, capture_output=True, check=True).stdout
    np.testing.assert_allclose(
        rows(json.loads(said)["data"]), expected[[0, 3]], rtol=1e-3, atol=1e-3
    )


def test_a_data_uri_is_an_image(http: Http, expected: Any) -> None:
    answer = post(http, entries(uri=[data_uri(CAT)]))
    np.testing.assert_allclose(rows(answer["data"]), expected[[3]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("on", ["/", "/rank"])
def test_a_blob_goes_before_the_uri_it_was_read_from(http: Http, on: str) -> None:
    """As clip-as-service's client sends images: every field of its Documents is there."""
    empty = dict.fromkeys(["parent_id", "tensor", "text", "tags", "embedding", "scores", "chunks"])
    image = {**empty, "blob": BLOB, "uri": "photos/cat.png", "matches": None}
    sentences = [{**empty, "uri": None, "blob": None, "text": text} for text in ("a cat", "a car")]
    (entry,) = post(http, [{**image, "matches": sentences} if on == "/rank" else image], on)["data"]
    assert "error" not in entry
    if on == "/rank":
        assert [match["text"] for match in entry["matches"]] == ["a cat", "a car"]


def test_a_remote_image_is_refused_alone(http: Http, expected: Any, sample_url: str) -> None:
    """clip-as-service's server fetched any address; ours says what to send instead."""
    fetched, sentence = post(http, [{"uri": sample_url}, {"text": "First do it"}])["data"]
    assert "data:" in fetched["error"]
    np.testing.assert_allclose(rows([sentence]), expected[[0]], rtol=1e-4, atol=1e-4)


def test_what_comes_back_has_the_shape_of_the_guide(http: Http) -> None:
    answer = post(http, entries(text=["hello, world!"]))
    header = answer["header"]
    assert re.fullmatch(r"\w+", header["requestId"])
    assert header["execEndpoint"] == "/"
    assert {"status", "targetExecutor"} <= header.keys()
    assert "parameters" in answer
    names = [route["executor"] for route in answer["routes"]]
    assert names[0] == "gateway"
    assert len(names) > 1
    for route in answer["routes"]:
        begun, ended = (datetime.fromisoformat(route[f"{end}Time"]) for end in ("start", "end"))
        assert begun <= ended
    (entry,) = answer["data"]
    assert entry["text"] == "hello, world!"
    assert len(entry["embedding"]) == DIM


def test_each_entry_has_an_id(http: Http) -> None:
    data = [{"text": "one"}, {"text": "two", "id": "mine"}, {"text": "three"}]
    ids = [entry["id"] for entry in post(http, data)["data"]]
    assert ids[1] == "mine"
    assert len(set(ids)) == 3
    assert all(isinstance(each, str) and each for each in ids)


def test_the_header_echoes_the_request_id(http: Http) -> None:
    header = {"requestId": "8b1f4b419bc54e95ab4b63cc086233c9"}
    answer = post(http, entries(text=["hello"]), header=header)
    assert answer["header"]["requestId"] == header["requestId"]


@pytest.mark.skipif(not shutil.which("jq"), reason="there is no jq")
def test_jq_filters_the_embeddings_out(onnx_server: Server) -> None:
    body = json.dumps({"data": entries(text=["hello", "world"]), "execEndpoint": "/"})
    command = ["curl", "-s", f"{onnx_server.http}/post", "-d", body,
               "-H", "Content-Type: application/json"]  # fmt: skip
    said = subprocess.run(command, capture_output=True, check=True).stdout
    filtered = subprocess.run(
        ["jq", "-c", ".data[] | .embedding"], input=said, capture_output=True, check=True
    ).stdout
    lines = [json.loads(line) for line in filtered.splitlines()]
    assert [len(line) for line in lines] == [DIM, DIM]


@pytest.mark.parametrize("on", ["/", "/encode", "/anything", "/encode/model-b"])
def test_any_endpoint_goes_where_jina_would_send_it(http: Http, expected: Any, on: str) -> None:
    """`@requests` without a name answers every endpoint that has no other handler."""
    answer = post(http, entries(text=SENTENCES), on)
    np.testing.assert_allclose(rows(answer["data"]), expected[:3], rtol=1e-4, atol=1e-4)
    assert answer["header"]["execEndpoint"] == on


def test_an_authorization_header_does_no_harm(http: Http) -> None:
    body = {"data": entries(text=["hello"]), "execEndpoint": "/"}
    answer = http.post("/post", json=body, headers={"Authorization": "my-token"})
    assert answer.status_code == 200


# Parameters

FAMILY = {
    "text": "the parent",
    "chunks": [{"text": "First do it"}, {"blob": BLOB}],
    "matches": [{"text": "then do it right"}],
}


@pytest.mark.parametrize("name", ["access_paths", "traversal_paths"])
@pytest.mark.parametrize("path", ["/post", "/encode"])
def test_access_paths(http: Http, expected: Any, name: str, path: str) -> None:
    def ask(paths: str) -> Any:
        body = {"data": [FAMILY], "execEndpoint": "/", "parameters": {name: paths}}
        answer = http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"][0]

    parent = ask("@c")
    assert parent.get("embedding") is None
    np.testing.assert_allclose(rows(parent["chunks"]), expected[[0, 3]], rtol=1e-3, atol=1e-3)
    assert parent["matches"][0].get("embedding") is None
    parent = ask("@m")
    np.testing.assert_allclose(rows(parent["matches"]), expected[[1]], rtol=1e-3, atol=1e-3)
    parent = ask("@r,c")
    assert len(parent["embedding"]) == DIM
    np.testing.assert_allclose(rows(parent["chunks"]), expected[[0, 3]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", ["/post", "/encode"])
def test_drop_image_content(http: Http, path: str) -> None:
    def ask(**parameters: Any) -> Any:
        body = {"data": [{"blob": BLOB}], "execEndpoint": "/", "parameters": parameters}
        return http.post(path, json=body).json()["data"][0]

    assert ask(drop_image_content=True).get("blob") is None
    assert base64.b64decode(ask(drop_image_content=False)["blob"]) == CAT.read_bytes()


def test_parameters_come_back(http: Http) -> None:
    answer = post(http, entries(text=["hello"]), parameters={"drop_image_content": True})
    assert answer["parameters"]["drop_image_content"] is True


# Ranking


@pytest.mark.parametrize("path", ["/post", "/rank"])
def test_rank(http: Http, path: str) -> None:
    matches = entries(text=["a photo of a dog", "a photo of a cat"])
    body = {"data": [{"blob": BLOB, "matches": matches}], "execEndpoint": "/rank"}
    answer = http.post(path, json=body).json()
    (document,) = answer["data"]
    scores = [match["scores"]["clip_score"]["value"] for match in document["matches"]]
    assert document["matches"][0]["text"] == "a photo of a cat"
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1)
    assert all(match["scores"]["clip_score_cosine"]["value"] for match in document["matches"])
    assert all(match["id"] for match in document["matches"])
    assert answer["header"]["execEndpoint"] == "/rank"


def test_rank_images_for_a_sentence(http: Http) -> None:
    matches = entries(uri=[data_uri(DOG), data_uri(CAT)])
    (document,) = post(http, [{"text": "a cat", "matches": matches}], "/rank")["data"]
    best, _ = (match["scores"]["clip_score"]["value"] for match in document["matches"])
    assert best > 0.5
