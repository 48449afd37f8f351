"""clip-as-service's own tests, ported: what each of them asked for, of our server and client.

Its fixtures made Jina Flows in Python around the executors; so do these, around the embedded model.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server, Start, flow, needs_torch
from docarray import DocList
from guide import CAT, DIM, DOG, SENTENCES, Document, Match, pixels, rows

from clip_client import Client

ENCODERS = ["onnx", pytest.param("torch", marks=[needs_torch, pytest.mark.slow])]


@pytest.fixture(scope="module", params=ENCODERS)
def server(request: pytest.FixtureRequest) -> Server:
    started: Server = request.getfixturevalue(f"{request.param}_server")
    return started


@pytest.fixture(scope="module")
def c(server: Server) -> Iterator[Client]:
    with Client(server=server.grpc) as client:
        yield client


def finished(answer: Any) -> Any:
    """The result of a call, awaited where it has to be."""
    return asyncio.run(answer) if inspect.isawaitable(answer) else answer


HELLO = ["hello, world", "goodbye, world"]


def documents(*texts: str) -> Any:
    return DocList[Document]([Document(text=text) for text in texts or HELLO])


def files() -> Any:
    return DocList[Document]([Document(uri=str(path)) for path in sorted(SAMPLES.glob("*.png"))])


# test_simple.py


@pytest.mark.parametrize("place", range(3), ids=["grpc", "http", "websocket"])
def test_protocols(server: Server, place: int) -> None:
    scheme = ("grpc", "http", "websocket")[place]
    with Client(server=f"{scheme}://0.0.0.0:{server.ports[place]}") as client:
        client.profile()
        client.profile(content="hello world")
        client.profile(content=str(CAT))


@pytest.mark.parametrize("call", ["encode", "aencode"])
@pytest.mark.parametrize(
    "build",
    [lambda: HELLO, lambda: tuple(HELLO), lambda: ("hello, world" for _ in range(10))],
    ids=["list", "tuple", "generator"],
)
def test_plain_inputs(c: Client, build: Callable[[], Any], call: str) -> None:
    assert finished(getattr(c, call)(build())).shape == (len(list(build())), DIM)


def test_mixed_inputs(c: Client, sample_url: str) -> None:
    assert c.encode([sample_url, str(CAT), "hello, world"]).shape == (3, DIM)


@pytest.mark.parametrize(
    "build",
    [
        lambda: list(documents()),
        documents,
        lambda: (Document(text="hello, world") for _ in range(10)),
        files,
    ],
    ids=["list", "DocList", "generator", "files"],
)
@pytest.mark.parametrize("call", ["encode", "aencode"])
def test_docarray_inputs(c: Client, build: Callable[[], Any], call: str) -> None:
    inputs = build()
    result = finished(getattr(c, call)(inputs))
    assert rows(result).shape == (len(list(build())), DIM)
    assert result[0].tensor is None
    assert result[0].blob is None
    assert result[0].tags == {}
    if hasattr(inputs, "__len__"):
        assert result[0] is inputs[0]


def test_every_kind_of_document(c: Client, sample_url: str) -> None:
    inputs = DocList[Document](
        [
            Document(uri=sample_url),
            Document(uri=str(CAT)),
            Document(text="hello, world"),
            Document(uri=str(CAT), tensor=pixels(CAT)),
            Document(text="hello, world", uri=sample_url),
        ]
    )
    was = [document.copy() for document in inputs]
    result = c.encode(inputs)
    assert rows(result).shape == (5, DIM)
    for document, before in zip(result, was, strict=True):
        assert (document.text, document.uri, document.blob) == (
            *(before.text, before.uri, before.blob),
        )


def test_docarray_preserve_original_order(c: Client) -> None:
    for build in (list, DocList[Document]):
        inputs = build([Document(id=str(number), text="hello, world") for number in range(20)])
        result = c.encode(inputs, batch_size=1)
        for number, document in enumerate(result):
            assert document is inputs[number]
            assert document.id == str(number)


@pytest.mark.parametrize("name", ["traversal_paths", "access_paths"])
@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_docarray_traversal(server: Server, protocol: str, name: str) -> None:
    from clip_server.executors.documents import ClipChunk, ClipDoc

    chunks = DocList[ClipChunk]([ClipChunk(text=text) for text in HELLO])
    sent = DocList[ClipDoc]([ClipDoc(chunks=chunks)])
    (document,) = jina_post(server, protocol, "/", sent, {name: "@c"})
    assert rows(document.chunks).shape == (2, DIM)
    assert document.embedding is None
    assert not document.blob


@pytest.mark.parametrize("protocol", ["grpc", "http", "websocket"])
def test_jinas_client(server: Server, protocol: str) -> None:
    """Any endpoint, more documents than one request holds, and parameters."""
    from clip_server.executors.documents import ClipDoc

    sent = DocList[ClipDoc]([ClipDoc(text=f"number {number}") for number in range(150)])
    with Client(server.grpc) as client:
        expected = client.encode([document.text for document in sent], normalize=True)
    for endpoint in ("/", "/encode", "/anything"):
        found = jina_post(server, protocol, endpoint, sent, {"normalize": True})
        np.testing.assert_allclose(rows(found), expected, rtol=1e-3, atol=1e-4)


def jina_post(
    server: Server, protocol: str, endpoint: str, sent: Any, parameters: dict[str, Any]
) -> Any:
    """What a Jina client gets, in the order of what it sent.

    In a thread: it waits without end for an answer that it does not understand.
    """
    from jina import Client as JinaClient

    place = ("grpc", "http", "websocket").index(protocol)
    client = JinaClient(host="127.0.0.1", port=server.ports[place], protocol=protocol)
    answer: Future[Any] = Future()

    def post() -> None:
        try:
            answer.set_result(
                client.post(
                    endpoint,
                    sent,
                    parameters=parameters,
                    return_type=DocList[sent.doc_type],
                )
            )
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=post, daemon=True).start()
    found = {document.id: document for document in answer.result(timeout=30)}
    # Not by Jina's own `results_in_order`, with which its client may wait forever.
    return [found[document.id] for document in sent]


# test_client.py


@pytest.mark.parametrize("call", ["encode", "aencode", "rank", "arank"])
@pytest.mark.parametrize("build", [list, DocList[Document]], ids=["list", "DocList"])
def test_empty_input(c: Client, call: str, build: Callable[[], Any]) -> None:
    inputs = build()
    result = finished(getattr(c, call)(inputs))
    assert len(result) == 0
    if isinstance(inputs, DocList):
        assert isinstance(result, DocList)


def test_client_large_input(c: Client) -> None:
    assert c.encode(["hello"] * 600).shape == (600, DIM)


@pytest.mark.parametrize("call", ["encode", "aencode", "rank", "arank"])
def test_custom_on_done(c: Client, call: str) -> None:
    got: dict[str, list[Any]] = {"on_done": [], "on_error": [], "on_always": []}
    sent = DocList[Document]([Document(text="hello", matches=DocList[Match]([Match(text="jina")]))])
    answer = getattr(c, call)(sent, **{name: each.append for name, each in got.items()})
    assert finished(answer) is None
    assert [len(each) for each in got.values()] == [1, 0, 1]


def test_client_concurrent_requests(c: Client) -> None:
    """Callers in five threads each get their own results."""

    def run(tag: str) -> Any:
        sent = [Document(id=f"{tag}_{number}", text=f"{tag} {number}") for number in range(20)]
        return c.encode(DocList[Document](random.sample(sent, len(sent))), batch_size=2)

    with ThreadPoolExecutor(5) as pool:
        for tag, result in zip("abcde", pool.map(run, "abcde"), strict=True):
            assert {document.id[:2] for document in result} == {f"{tag}_"}
            expected = c.encode([document.text for document in result])
            np.testing.assert_allclose(rows(result), expected, rtol=1e-3, atol=1e-3)


# test_asyncio.py


def test_async_encode(c: Client) -> None:
    async def main() -> Any:
        other = asyncio.create_task(asyncio.sleep(0.1))
        encoding = asyncio.create_task(c.aencode(["hello world"] * 10))
        await asyncio.gather(other, encoding)
        return encoding.result()

    assert asyncio.run(main()).shape == (10, DIM)


# test_ranker.py, and the executors used in Python


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> Iterator[Any]:
    from importlib import import_module

    module = import_module(f"clip_server.executors.clip_{request.param}")
    made = module.CLIPEncoder("embedded")
    yield made
    made.close()


def ranked(encoder: Any, sent: list[Any]) -> Any:
    from clip_server.executors.documents import ClipDoc

    docs = DocList[ClipDoc](sent)
    # As the tests had it: parameters by place, and the result in the documents.
    asyncio.run(encoder.rank(docs, {}))
    return docs


def test_executor_rank_img2texts(encoder: Any) -> None:
    from clip_server.executors.documents import ClipDoc, ClipMatch

    sent = [
        ClipDoc(
            blob=path.read_bytes(),
            matches=DocList[ClipMatch]([ClipMatch(text=text) for text in HELLO]),
        )
        for path in (CAT, DOG)
    ]
    for document in ranked(encoder, sent):
        assert len(document.matches) == 2
        assert all(match.scores["clip_score"] is not None for match in document.matches)


def test_executor_rank_text2imgs(encoder: Any) -> None:
    from clip_server.executors.documents import ClipDoc, ClipMatch

    images = [ClipMatch(blob=path.read_bytes()) for path in (CAT, DOG)]
    sent = [ClipDoc(text=text, matches=DocList[ClipMatch](images)) for text in HELLO]
    for document in ranked(encoder, sent):
        assert all(match.scores["clip_score"] is not None for match in document.matches)


def test_executor_encode(encoder: Any) -> None:
    from clip_server.executors.documents import ClipDoc

    docs = DocList[ClipDoc]([ClipDoc(text="hello"), ClipDoc(blob=CAT.read_bytes())])
    asyncio.run(encoder.encode(docs, {}))
    assert rows(docs).shape == (2, DIM)
    asyncio.run(encoder.encode(docs))
    assert rows(docs).shape == (2, DIM)


@pytest.mark.parametrize("call", ["rank", "arank"])
def test_rank_of_documents(c: Client, sample_url: str, call: str) -> None:
    sent = [
        Document(uri=sample_url, matches=DocList[Match]([Match(text=text) for text in HELLO])),
        Document(
            text="hello, world",
            matches=DocList[Match]([Match(uri=sample_url), Match(uri=str(DOG))]),
        ),
    ]
    for document in finished(getattr(c, call)(sent)):
        for match in document.matches:
            assert match.scores["clip_score"] > 0
            assert -1 <= match.scores["clip_score_cosine"] <= 1


# test_server.py


@pytest.mark.parametrize("shape", [(100, 100, 3), (1, 1, 3), (5, 50, 3)])
@pytest.mark.parametrize("scale", [1, 255], ids=["to 1", "to 255"])
def test_transform_arbitrary_tensor(c: Client, shape: tuple[int, int, int], scale: int) -> None:
    """Float arrays as NumPy makes them: what `PIL.Image.fromarray` made of them, in RGB."""
    tensor = np.random.default_rng(0).random(shape) * scale
    assert tensor.dtype == np.float64
    result = c.encode([Document(tensor=tensor), Document(tensor=tensor.astype(np.float32))])
    assert np.isfinite(rows(result)).all()
    if scale == 255:
        expected = c.encode([tensor.astype(np.uint8)])[0]
        np.testing.assert_allclose(rows(result)[0], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"name": "ABC"}, "ABC"),
        ({"name": "ViT-B/32", "model_path": "no/such/folder"}, "no/such/folder"),
    ],
    ids=["name", "path"],
)
def test_a_wrong_model_is_an_error_at_the_start(
    start: Start, parameters: dict[str, Any], said: str
) -> None:
    server = start(flow(**parameters), wait=False)
    assert server.process.wait(60) != 0
    assert said in server.output()
    assert "Traceback" not in server.output()


# test_model.py, test_tokenization.py


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("ViT-L/14@336px", 768),
        ("RN50::openai", 1024),
        ("roberta-ViT-B-32::laion2b-s12b-b32k", 512),
        ("M-CLIP/LABSE-Vit-L-14", 768),
        ("CN-CLIP/ViT-B-16", 512),
        ("ViT-H-14::laion2b-s32b-b79k", 1024),
        ("M-CLIP/XLM-Roberta-Large-Vit-B-32", 512),
    ],
)
def test_model_names(name: str, dim: int) -> None:
    from clip_server.models import zoo

    assert zoo.resolve(name).dim == dim


def test_numpy_softmax(c: Client) -> None:
    """Probabilities are the softmax over the matches, of cosines times the model's logit scale."""
    ranking = c.rank("a cat", [CAT, DOG, *SENTENCES])
    logits = c.info().logit_scale * np.array([match.cosine for match in ranking])
    raised = np.exp(logits - logits.max())
    expected = raised / raised.sum()
    np.testing.assert_allclose([match.probability for match in ranking], expected, rtol=1e-3)
