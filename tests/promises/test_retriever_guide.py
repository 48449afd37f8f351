"""The guide's page on retrieval, and clip-as-service's own tests of it, around our indexer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SAMPLES, Server, Start, free_ports
from docarray import DocList
from guide import CAT, DIM, Document, Match, pixels, rows

from clip_client import Client

# The guide's own flow, with the embedded model's dimension.
FLOW = """
jtype: Flow
version: '1'
with:
  port: {port}
executors:
  - name: encoder
    uses:
      jtype: CLIPEncoder
      with:
        name: embedded
      metas:
        py_modules:
          - clip_server.executors.clip_onnx

  - name: indexer
    uses:
      jtype: AnnLiteIndexer
      with:
        n_dim: 256
      workspace: '{workspace}'
      metas:
        py_modules:
          - annlite.executor
"""


@pytest.fixture(scope="module")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Server:
    pytest.importorskip("faiss")
    (port,) = free_ports(1)
    workspace = tmp_path_factory.mktemp("workspace")
    return start(yaml.safe_load(FLOW.format(port=port, workspace=workspace)))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(server=f"grpc://0.0.0.0:{server.ports[0]}") as one:
        yield one


def finished(answer: Any) -> Any:
    return asyncio.run(answer) if asyncio.iscoroutine(answer) else answer


def test_search_finds_what_was_indexed(client: Client, sample_url: str) -> None:
    client.index(
        [
            Document(text="she smiled, with pain"),
            Document(uri=str(SAMPLES / "pizza.png")),
            Document(uri=sample_url),
        ]
    )
    (query,) = client.search(DocList[Document]([Document(text="she smiled, with pain")]), limit=2)
    best, other = query.matches
    assert best.text == "she smiled, with pain"
    assert best.scores["cosine"] == pytest.approx(1, abs=1e-3)
    assert best.scores["cosine"] > other.scores["cosine"]


def test_search_by_strings(client: Client) -> None:
    client.index([Document(text="she smiled, with pain")])
    assert len(client.search(["smile"])) == 1
    assert len(client.search(["smile", str(CAT)], limit=1)) == 2


@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("twin", ["", "a"], ids=["blocking", "async"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: [Document(text="hello, world"), Document(text="goodbye, world")],
        lambda: DocList[Document]([Document(text="hello, world"), Document(text="goodbye, world")]),
        lambda: (Document(text=f"hello, world {number}") for number in range(10)),
        lambda: DocList[Document](
            [
                *(Document(uri=str(CAT)), Document(text="hello, world")),
                *(Document(tensor=pixels(CAT)), Document(blob=CAT.read_bytes())),
            ]
        ),
    ],
    ids=["list", "DocList", "generator", "all kinds"],
)
def test_index_search(client: Client, build: Callable[[], Any], twin: str, limit: int) -> None:
    indexed = finished(getattr(client, f"{twin}index")(build()))
    assert len(indexed) == len(list(build()))
    found = finished(getattr(client, f"{twin}search")(build(), limit=limit))
    assert [len(document.matches) for document in found] == [limit] * len(list(build()))


def test_indexed_documents_have_their_embeddings(client: Client) -> None:
    sent = [Document(text="hello, world"), Document(uri=str(CAT))]
    result = client.index(sent)
    assert [one is other for one, other in zip(result, sent, strict=True)] == [True, True]
    np.testing.assert_allclose(
        rows(result), client.encode(["hello, world", str(CAT)]), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("call", ["index", "search", "aindex", "asearch"])
def test_empty_and_wrong_input(client: Client, call: str) -> None:
    assert len(finished(getattr(client, call)(DocList[Document]([])))) == 0
    with pytest.raises(TypeError):
        finished(getattr(client, call)("hello"))


@pytest.mark.parametrize("call", ["index", "search", "aindex", "asearch"])
def test_custom_on_done(client: Client, call: str) -> None:
    got: dict[str, list[Any]] = {"on_done": [], "on_error": [], "on_always": []}
    sent = DocList[Document]([Document(text="hello", matches=DocList[Match]([Match(text="jina")]))])
    answer = getattr(client, call)(sent, **{name: each.append for name, each in got.items()})
    assert finished(answer) is None
    assert [len(each) for each in got.values()] == [1, 0, 1]


def test_encoding_needs_no_index(client: Client) -> None:
    assert client.encode(["hello"]).shape == (1, DIM)
    assert np.isfinite(client.encode([str(CAT)])).all()


def test_the_index_is_in_the_workspace(server: Server, client: Client) -> None:
    client.index([Document(text="kept")])
    spec = yaml.safe_load((server.log.parent / "flow.yml").read_text())
    assert any(Path(spec["executors"][1]["uses"]["workspace"]).rglob("*"))
