"""The search service: what is indexed is found, over every protocol."""

from __future__ import annotations

import base64
import itertools
import os
import signal
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import SAMPLES, Http, Server, Start, flow, search_flow

from clip_client import Client

IMAGES = sorted(SAMPLES.glob("*.png"))
BATCH = 32
TEXTS = ["a smiling cat", "a red car", "a slice of pizza"]


@pytest.fixture
def http(search_server: Server) -> Http:
    """The server, with an empty collection."""
    session = Http(search_server.http)
    everything = {"parameters": {"filter": {"$or": [{"x": 1}, {"x": {"$ne": 1}}]}}}
    assert session.post("/delete", json=everything).status_code == 200
    return session


def entry(image: Path, **fields: Any) -> dict[str, Any]:
    content = base64.b64encode(image.read_bytes()).decode()
    return {"blob": content, "source": image.name, **fields}


def index_all(http: Http) -> None:
    data = [entry(image, tags={"name": image.stem, "length": len(image.stem)}) for image in IMAGES]
    data += [{"id": f"text-{n}", "text": text, "tags": {"n": n}} for n, text in enumerate(TEXTS)]
    answer = http.post("/index", json={"data": data}).json()
    ids = [image.name for image in IMAGES] + [f"text-{n}" for n in range(3)]
    assert answer["data"] == [{"id": each} for each in ids]


def search(http: Http, query: Any, **parameters: Any) -> list[dict[str, Any]]:
    answer = http.post("/search", json={"data": [query], "parameters": parameters})
    assert answer.status_code == 200, answer.text
    matches: list[dict[str, Any]] = answer.json()["data"][0]["matches"]
    return matches


def test_texts_and_images_find_each_other(http: Http) -> None:
    index_all(http)
    best = search(http, "a smiling cat", target="images")[0]
    assert (best["id"], best["uri"], best["modality"]) == ("cat.png", "cat.png", "image")
    assert best["tags"] == {"name": "cat", "length": 3}
    assert 0 < best["scores"]["cosine"]["value"] < 1
    assert 0.5 < best["scores"]["relevance"]["value"] <= 1
    picture = entry(SAMPLES / "pizza.png")
    assert search(http, picture, limit=1)[0]["id"] == "pizza.png"
    text = search(http, picture, target="texts", limit=1)
    assert [(each["text"], each["tags"]) for each in text] == [("a slice of pizza", {"n": 2})]
    assert len(search(http, "a cat", limit=4)) == 4
    assert {each["modality"] for each in search(http, "a cat", limit=50)} == {"text", "image"}


def test_filters_thresholds_and_counts(http: Http) -> None:
    index_all(http)
    names = [each["tags"]["name"] for each in search(http, "a cat", filter={"length": {"$gt": 5}})]
    assert sorted(names) == sorted(image.stem for image in IMAGES if len(image.stem) > 5)
    near = search(http, "a smiling cat", score_threshold=0.3, target="images")
    assert [each["id"] for each in near] == ["cat.png"]
    assert search(http, "a smiling cat", min_relevance=0.9, target="images")[0]["id"] == "cat.png"
    images = {"parameters": {"target": "images"}}
    assert http.post("/count", json={}).json() == {"count": len(IMAGES) + 3}
    assert http.post("/count", json=images).json() == {"count": len(IMAGES)}
    few = {"parameters": {"filter": {"n": {"$in": [0, 2]}}}}
    assert http.post("/count", json=few).json() == {"count": 2}
    assert http.post("/delete", json=few).json() == {"count": 2}
    assert http.post("/delete", json={"ids": ["cat.png", "nobody"]}).json() == {"count": 1}
    assert http.post("/count", json={}).json() == {"count": len(IMAGES)}
    assert "cat.png" not in [each["id"] for each in search(http, "a cat", limit=50)]


def test_same_ids_replace_and_same_content_is_one_row(http: Http) -> None:
    for _ in range(2):
        index_all(http)
        http.post("/index", json={"data": ["a text without an id"]})
    assert http.post("/count", json={}).json() == {"count": len(IMAGES) + 4}
    http.post("/index", json={"data": [{"id": "text-0", "text": "a house"}]})
    assert search(http, "a house", target="texts", limit=1)[0] | {"scores": 0} == {
        "id": "text-0", "text": "a house", "modality": "text", "scores": 0,
    }  # fmt: skip


def test_errors_are_those_of_the_item(http: Http) -> None:
    data = ["a cat", " ", {"blob": "AAAA"}, {"text": "a", "id": {}}, {"text": "b", "tags": 3},
            {"text": "c", "id": "x" * 2000}, {"uri": "file:///etc/passwd"}, "a dog"]  # fmt: skip
    answer = http.post("/index", json={"data": data}).json()["data"]
    assert [sorted(each) for each in answer] == [["id"], *[["error"]] * 6, ["id"]]
    assert http.post("/count", json={}).json() == {"count": 2}
    answer = http.post("/search", json={"data": ["a cat", " "]}).json()["data"]
    assert answer[0]["matches"][0]["text"] == "a cat"
    assert "empty text" in answer[1]["error"]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"filter": {"a": {"$regex": "x"}}}, "no operator"),
        ({"filter": "a = 1 OR 1=1"}, "not JSON"),
        ({"filter": 3}, "filter is not an object"),
        ({"limit": 0}, "limit"),
        ({"limit": 10**6}, "limit"),
        ({"target": "videos"}, "both, texts, images"),
        ({"min_relevance": 2}, "between 0 and 1"),
        ({"nobody": 1}, "unknown parameter"),
    ],
)
def test_wrong_parameters_are_refused(http: Http, parameters: Any, said: str) -> None:
    answer = http.post("/search", json={"data": ["a cat"], "parameters": parameters})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_embeddings_of_ones_own(http: Http) -> None:
    dim = http.get("/info").json()["dim"]
    vectors = [[float(place == row) for place in range(dim)] for row in range(3)]
    data = [{"id": f"{row}", "text": "t", "embedding": v} for row, v in enumerate(vectors)]
    assert len(http.post("/index", json={"data": data}).json()["data"]) == 3
    found = search(http, {"embedding": vectors[1]}, limit=1)
    assert (found[0]["id"], found[0]["scores"]["cosine"]["value"]) == ("1", 1)
    short = http.post("/index", json={"data": [{"text": "t", "embedding": [1.0]}]})
    assert (short.status_code, f"{dim} dimensions" in short.text) == (400, True)
    mixed = http.post("/index", json={"data": ["t", data[0]]})
    assert mixed.status_code == 400
    zero = http.post("/index", json={"data": [{"text": "t", "embedding": [0.0] * dim}]})
    assert "zero" in zero.json()["data"][0]["error"]


def test_the_route_of_jina(http: Http) -> None:
    http.post("/post", json={"data": [{"text": "a cat"}], "execEndpoint": "/index"})
    answer = http.post("/post", json={"data": [{"text": "a cat"}], "execEndpoint": "/search"})
    assert answer.json()["data"][0]["matches"][0]["text"] == "a cat"
    assert http.get("/info").json()["collection"]["rows"] == 1
    assert "clip_rows_indexed" in http.get("/metrics").text


@pytest.mark.usefixtures("http")
def test_a_jina_client(search_server: Server) -> None:
    from docarray import DocList
    from jina import Client

    from clip_server.executors.documents import ClipDoc

    client = Client(port=search_server.ports[0])
    docs = DocList[ClipDoc](
        [ClipDoc(id=f.stem, blob=f.read_bytes(), uri=f.name, tags={"n": n})
         for n, f in enumerate(IMAGES)] + [ClipDoc(id="bad", blob=b"no image")]
    )  # fmt: skip
    kinds = {"return_type": DocList[ClipDoc]}
    indexed = client.post("/index", docs, **kinds)
    assert [doc.id for doc in indexed if doc.error] == ["bad"]
    queries = DocList[ClipDoc]([ClipDoc(text="a smiling cat")])
    parameters = {"limit": 2, "filter": {"n": {"$gte": 1}}}
    (found,) = client.post("/search", queries, parameters=parameters, **kinds)
    assert [len(found.matches), found.matches[0].id, found.matches[0].uri] == [2, "cat", "cat.png"]
    assert found.matches[0].tags == {"n": 1}
    assert 0 < found.matches[0].scores["cosine"] < 1
    (counted,) = client.post("/count", DocList[ClipDoc]([]), **kinds)
    assert counted.tags["count"] == len(IMAGES)
    (removed,) = client.post("/delete", DocList[ClipDoc]([ClipDoc(id="cat")]), **kinds)
    assert removed.tags["count"] == 1
    with pytest.raises(Exception, match="no operator"):
        client.post("/search", queries, parameters={"filter": {"a": {"$x": 1}}}, **kinds)


@pytest.mark.slow
def test_the_collection_stays_and_keeps_to_its_model(start: Start, tmp_path: Path) -> None:
    """The flow of clip-as-service's documentation; SIGKILL; another model; the flow as ours."""
    folder = tmp_path / "workspace"
    spec = flow("onnx")
    annlite = {
        "jtype": "AnnLiteIndexer",
        "with": {"n_dim": 256, "limit": 2},
        "metas": {"py_modules": ["annlite.executor"]},
    }
    spec["executors"].append({"name": "indexer", "uses": annlite, "workspace": str(folder)})
    server = start(spec)
    index_all(Http(server.http))
    assert len(search(Http(server.http), "a cat")) == 2
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()
    other = start(search_flow(folder, {"dtype": "int8"}), wait=False)
    assert other.process.wait(60) == 1
    assert "precision is float, not int8" in other.output()
    server = start(search_flow(folder, return_k=1))
    assert f"{len(IMAGES) + 3} rows in the collection" in server.output()
    assert [e["id"] for e in search(Http(server.http), "a cat", target="images")] == ["cat.png"]
    server.stop()


def test_a_flow_without_an_indexer_says_so(onnx_server: Server) -> None:
    answer = Http(onnx_server.http).post("/search", json={"data": ["a cat"]})
    assert answer.status_code == 400
    assert "no CLIPIndexer" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("with_", "said"),
    [
        ({"index_method": "PQ"}, "none of auto, Flat"),
        ({"dist_type": "HAMMING"}, "none of COSINE, IP, L2"),
        ({"return_k": 0}, "return_k"),
        ({"engine": "lucene"}, "none of local, milvus"),
        ({"indexmethod": "Flat"}, "did you mean index_method"),
    ],
)
def test_mistakes_in_the_flow_are_refused(tmp_path: Path, with_: Any, said: str) -> None:
    from clip_server.errors import ConfigurationError
    from clip_server.launch.flow import prepare

    with pytest.raises(ConfigurationError, match=said):
        prepare(search_flow(tmp_path / "rows", **with_))


@pytest.mark.slow
def test_two_indexers_share_a_collection_on_milvus(
    start: Start, milvus: str, tmp_path: Path
) -> None:
    spec = search_flow(tmp_path / "unused", uri=milvus, collection=f"c{uuid.uuid4().hex}")
    spec["executors"][-1]["replicas"] = 2
    server = start(spec)
    http = Http(server.http)
    index_all(http)
    # Every other request goes to the replica that did not store the rows.
    for _ in range(2):
        assert search(http, "a smiling cat", target="images", limit=1)[0]["id"] == "cat.png"
        assert http.post("/count", json={}).json() == {"count": len(IMAGES) + 3}
    with Client(server.grpc) as client:
        (matches,) = client.search(["a car"], limit=1, target="texts", filter={"n": {"$lt": 2}})
        assert [match.text for match in matches] == ["a red car"]
        assert client.delete(["text-0", "nobody"]) == 1
    server.stop()
    http = Http(start(spec).http)
    assert http.post("/count", json={}).json() == {"count": len(IMAGES) + 2}
    assert search(http, entry(SAMPLES / "pizza.png"), limit=1)[0]["id"] == "pizza.png"
    assert not (tmp_path / "unused").exists()


@pytest.mark.slow
@pytest.mark.parametrize("collection", range(2))
def test_kill_of_the_server_loses_no_acknowledged_row(
    start: Start, tmp_path: Path, collection: int
) -> None:
    """SIGKILL of all its processes while it stores rows, four times over one collection. Of the
    store alone: test_search_store.py."""
    spec = search_flow(tmp_path / "rows")
    acknowledged: list[str] = []
    server = start(spec)
    for kill in range(1, 5):
        acknowledged += index_until_killed(server, f"{kill}", 0.2 * (4 * collection + kill))
        server = start(spec)
        count = Http(server.http).post("/count", json={}).json()["count"]
        # The batch in flight is stored as a whole or not at all.
        assert count - len(acknowledged) in range(0, BATCH * kill + 1, BATCH)
    http = Http(server.http)
    last = acknowledged[-1]
    assert search(http, f"text {last}", limit=1)[0]["id"] == last
    deleted = http.post("/delete", json={"ids": acknowledged})
    assert deleted.json() == {"count": len(acknowledged)}
    server.stop()


def index_until_killed(server: Server, prefix: str, seconds: float) -> list[str]:
    """Stores batches of texts until SIGKILL, so long after the first: the ids acknowledged."""
    http, acknowledged = Http(server.http), []
    killer = threading.Timer(seconds, os.killpg, (server.process.pid, signal.SIGKILL))
    for batch in itertools.count():
        ids = [f"{prefix}-{batch}-{n}" for n in range(BATCH)]
        data = [{"id": each, "text": f"text {each}"} for each in ids]
        try:
            http.post("/index", json={"data": data}).raise_for_status()
        except requests.RequestException:
            break
        acknowledged += ids
        if batch == 0:
            killer.start()
    killer.join()
    server.process.wait()
    return acknowledged
