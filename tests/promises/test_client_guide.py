"""The client's page of clip-as-service's guide, sentence by sentence, against our server."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import iglob
from typing import Any

import numpy as np
import pytest
from conftest import SAMPLES, Server
from docarray import DocList
from docarray.documents.legacy import LegacyDocument
from fake_server import SCHEMES, FakeServer
from guide import CAT, DIM, DOG, PIZZA, SENTENCES, Document, Match, data_uri, pixels, rows, texts

from clip_client import Client, ConnectionFailedError


@pytest.fixture(scope="module")
def c(onnx_server: Server) -> Iterator[Client]:
    with Client(onnx_server.grpc) as client:
        yield client


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer("grpc") as server:
        yield server


# Constructing a client


def test_the_scheme_is_one_of_six() -> None:
    for scheme in ("grpc", "websocket", "http", "grpcs", "websockets", "https"):
        Client(f"{scheme}://192.168.0.3:51234").close()
    for wrong in ("other", "ftp"):
        with pytest.raises(ValueError, match=wrong):
            Client(f"{wrong}://0.0.0.0:8000")
    with pytest.raises(ValueError, match=r"[Pp]ort"):
        Client("grpc://0.0.0.0:99999")


def test_the_first_argument_is_called_server(onnx_server: Server) -> None:
    address = onnx_server.websocket.replace("ws://", "websocket://")
    with Client(server=address) as client:
        assert client.encode(["hello"]).shape == (1, DIM)


@pytest.mark.parametrize("place", range(3), ids=["grpc", "http", "websocket"])
def test_0_0_0_0_is_the_server_on_this_machine(onnx_server: Server, place: int) -> None:
    scheme = ("grpc", "http", "websocket")[place]
    with Client(f"{scheme}://0.0.0.0:{onnx_server.ports[place]}") as client:
        assert client.encode(SENTENCES).shape == (3, DIM)


def sent_credentials(scheme: str, **arguments: Any) -> set[Any]:
    """The authorization headers that a client sends."""
    with FakeServer(scheme) as server:
        seen: set[Any] = set()
        server.admits = lambda header: seen.add(header) or True  # type: ignore[method-assign]
        with Client(server.address, **arguments) as client:
            client.encode(["hello"])
    return seen


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_credential_is_sent_as_it_is(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLIP_AUTH_TOKEN", raising=False)
    token = {"Authorization": "my-token"}
    assert sent_credentials(scheme, credential=token) == {"my-token"}
    for nothing in ({}, None):
        assert sent_credentials(scheme, credential=nothing) == {None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_environment_may_hold_the_credential(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIP_AUTH_TOKEN", "from-the-environment")
    assert sent_credentials(scheme) == {"from-the-environment"}
    assert sent_credentials(scheme, credential={"Authorization": "my-token"}) == {"my-token"}


@pytest.mark.parametrize("environment", [{}, {"NO_VERSION_CHECK": "1"}])
def test_importing_asks_nobody_for_a_version(environment: dict[str, str]) -> None:
    code = (
        "import sys, threading\n"
        "def refuse(event, args):\n"
        "    if event == 'socket.connect': print('connected', args[1], flush=True)\n"
        "sys.addaudithook(refuse)\n"
        "import clip_client\n"
        "[thread.join() for thread in threading.enumerate() if thread is not "
        "threading.main_thread() and not thread.daemon]\n"
        "print(clip_client.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "connected" not in done.stdout


# Encoding


@pytest.mark.parametrize("build", [list, tuple, iter], ids=["list", "tuple", "generator"])
def test_an_iterable_of_str_gives_an_array(c: Client, build: Callable[[Any], Any]) -> None:
    result = c.encode(build(SENTENCES))
    assert isinstance(result, np.ndarray)
    assert result.shape == (3, DIM)
    assert result.dtype == np.float32


def test_content_is_the_name_of_what_is_encoded(c: Client) -> None:
    np.testing.assert_allclose(c.encode(content=SENTENCES), c.encode(SENTENCES), atol=1e-5)
    result = asyncio.run(c.aencode(content=SENTENCES))
    np.testing.assert_allclose(result, c.encode(SENTENCES), atol=1e-5)


def test_a_uri_is_an_image_and_anything_else_a_sentence(
    c: Client, sample_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(SAMPLES)
    result = c.encode(
        ["she smiled, with pain", "cat.png", str(CAT), sample_url, data_uri(CAT), data_uri(CAT)]
    )
    expected = c.encode([CAT.read_bytes()])[0]
    for row in result[1:]:
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-4)
    assert not np.allclose(result[0], expected, atol=1e-2)


def test_a_gif_in_a_data_uri(c: Client) -> None:
    result = c.encode([data_uri(CAT, "gif")])
    assert np.isfinite(result).all()


def guide_documents(sample_url: str) -> list[Any]:
    return [
        Document(text="she smiled, with pain"),
        Document(uri=str(CAT)),
        Document(tensor=pixels(CAT)),
        Document(blob=CAT.read_bytes()),
        Document(uri=sample_url),
        Document(uri=data_uri(CAT)),
    ]


@pytest.mark.parametrize("build", [list, DocList[Document]], ids=["list", "DocList"])
def test_documents_come_back_with_embeddings(
    c: Client, sample_url: str, build: Callable[[Any], Any]
) -> None:
    sent = build(guide_documents(sample_url))
    before = [document.dict(exclude={"embedding"}) for document in guide_documents(sample_url)]
    result = c.encode(sent)
    assert len(result) == 6
    # The objects that were passed, in their order.
    assert all(one is other for one, other in zip(result, sent, strict=True))
    expected = c.encode(["she smiled, with pain", *[CAT.read_bytes()] * 5])
    np.testing.assert_allclose(rows(result), expected, rtol=1e-2, atol=1e-2)
    for document, was in zip(result, before, strict=True):
        now = document.dict(exclude={"embedding", "id", "tensor"})
        assert now == {name: value for name, value in was.items() if name not in ("id", "tensor")}


def test_a_generator_of_documents_gives_documents(c: Client) -> None:
    made = [Document(id=str(number), text="hello, world") for number in range(20)]
    result = c.encode((document for document in made), batch_size=3)
    assert [document.id for document in result] == [str(number) for number in range(20)]
    assert rows(result).shape == (20, DIM)


def test_a_doc_list_has_the_summary_and_the_embeddings(
    c: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    result = c.encode(DocList[Document]([Document(text="hello"), Document(uri=str(CAT))]))
    assert isinstance(result, DocList)
    result.summary()
    assert "Length" in capsys.readouterr().out
    assert np.stack(result.embedding).shape == (2, DIM)


def test_docarrays_own_legacy_document(c: Client) -> None:
    sent = [LegacyDocument(text="hello"), LegacyDocument(url=str(CAT)),
            LegacyDocument(blob=CAT.read_bytes()), LegacyDocument(tensor=pixels(CAT))]  # fmt: skip
    assert rows(c.encode(sent)).shape == (4, DIM)


def test_of_text_and_uri_the_text_is_used(c: Client) -> None:
    (document,) = c.encode([Document(text="hello, world", uri="https://nowhere.invalid/a.png")])
    np.testing.assert_allclose(document.embedding, c.encode(["hello, world"])[0], atol=1e-5)


def test_ids_need_not_be_unique(c: Client) -> None:
    """In clip-as-service the results of documents with one id were incomplete."""
    result = c.encode([Document(id="same", text=text) for text in SENTENCES], batch_size=1)
    np.testing.assert_allclose(rows(result), c.encode(SENTENCES), rtol=1e-4, atol=1e-4)


def test_what_is_no_iterable_of_items_is_refused(c: Client) -> None:
    for call in (c.encode, c.rank):
        with pytest.raises(TypeError):
            call("hello")
    for call in (c.aencode, c.arank):
        with pytest.raises(TypeError):
            asyncio.run(call("hello"))


def test_async_encoding_leaves_the_loop_to_others(c: Client) -> None:
    events = []

    async def another_heavylifting_job() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            events.append("other")

    async def main() -> Any:
        encoding = asyncio.create_task(c.aencode(["hello world"] * 100))
        await asyncio.gather(asyncio.create_task(another_heavylifting_job()), encoding)
        events.append("encoded")
        return encoding.result()

    assert asyncio.run(main()).shape == (100, DIM)
    assert events == ["other", "other", "other", "encoded"]


# Ranking


def image_to_sentences() -> Any:
    names = ("car", "cat", "rocket", "slice of pizza", "dog")
    matches = DocList[Match]([Match(text=f"a {name}") for name in names])
    return Document(uri=str(CAT), matches=matches)


def sentence_to_images(sample_url: str) -> Any:
    matches = DocList[Match]([Match(uri=str(DOG)), Match(uri=str(PIZZA)), Match(uri=sample_url)])
    return Document(text="a cat", matches=matches)


@pytest.mark.parametrize("call", ["rank", "arank"])
def test_rank_sorts_the_matches(c: Client, sample_url: str, call: str) -> None:
    sent = [image_to_sentences(), sentence_to_images(sample_url)]
    answer = getattr(c, call)(sent)
    result = asyncio.run(answer) if call == "arank" else answer
    assert [document is was for document, was in zip(result, sent, strict=True)] == [True, True]
    assert texts(result[0].matches)[0] == "a cat"
    assert result[1].matches[0].uri == sample_url
    for document in result:
        scores = [match.scores["clip_score"] for match in document.matches]
        assert scores == sorted(scores, reverse=True)
        assert all(score > 0 for score in scores)
        assert sum(scores) == pytest.approx(1)
        assert all("clip_score_cosine" in match.scores for match in document.matches)


@pytest.mark.parametrize("build", [list, DocList[Document], iter], ids=["list", "DocList", "iter"])
def test_rank_takes_what_encode_takes(c: Client, build: Callable[[Any], Any]) -> None:
    sent = [image_to_sentences() for _ in range(3)]
    result = c.rank(build(sent), batch_size=2, prefetch=2, show_progress=False, parameters={})
    assert [document.id for document in result] == [document.id for document in sent]
    assert [texts(document.matches)[0] for document in result] == ["a cat"] * 3


def test_docs_is_the_name_of_what_is_ranked(c: Client) -> None:
    (document,) = c.rank(docs=[image_to_sentences()])
    assert texts(document.matches)[0] == "a cat"
    (document,) = asyncio.run(c.arank(docs=[image_to_sentences()]))
    assert texts(document.matches)[0] == "a cat"


def test_the_candidates_may_be_chunks(c: Client) -> None:
    document = Document(uri=str(CAT), chunks=image_to_sentences().matches)
    (document,) = c.rank([document], source="chunks")
    assert texts(document.chunks)[0] == "a cat"


@pytest.mark.parametrize("matches", [None, DocList[Match]()], ids=["none", "empty"])
def test_a_document_without_matches_cannot_be_ranked(c: Client, matches: Any) -> None:
    with pytest.raises(ValueError, match="matches"):
        c.rank([Document(text="a cat", matches=matches)])


# Profiling

LINES = ("Roundtrip", "Client-server network", "Server", "Gateway-CLIP network", "CLIP model")


def test_profile_prints_a_tree_and_returns_its_numbers(
    c: Client, sample_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in ((), ("hello, world",), (str(CAT),), (sample_url,)):
        lines = c.profile(*arguments)
        printed = capsys.readouterr().out
        for name in LINES:
            assert name in printed
            assert lines[name] >= 0
        assert lines["Client-server network"] + lines["Server"] == pytest.approx(
            lines["Roundtrip"], rel=0.01
        )
        assert "100" in printed
        assert "├──" in printed


def test_profile_by_the_name_of_its_argument(onnx_server: Server) -> None:
    for address in onnx_server.addresses:
        with Client(address) as client:
            assert client.profile(content="hello world")["Roundtrip"] > 0
            assert asyncio.run(client.aprofile(content=str(CAT)))["Roundtrip"] > 0


# Best practices


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_size_is_the_size_of_each_request(fake: FakeServer, batch_size: int) -> None:
    with Client(fake.address) as client:
        client.encode([f"text {number}" for number in range(20)], batch_size=batch_size)
    sizes = [len(request.items) for request in fake.requests]
    assert sum(sizes) == 20
    assert max(sizes) == batch_size


def test_sending_is_not_blocked_by_receiving(fake: FakeServer) -> None:
    """The server answers nothing until it has two requests."""
    fake.gate.clear()
    with Client(fake.address) as client, ThreadPoolExecutor(1) as pool:
        result = pool.submit(client.encode, SENTENCES, batch_size=1)
        while fake.most_in_flight < 2:
            assert not result.done()
        fake.gate.set()
        assert len(result.result()) == 3


def test_the_progress_bar_is_on_demand(c: Client, capfd: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        c.encode(SENTENCES, show_progress=shown)
        c.rank([image_to_sentences()], show_progress=shown)
        said = capfd.readouterr()
        assert said.out == ""
        assert ("3/3" in said.err) is shown


def test_every_image_in_a_directory(c: Client) -> None:
    count = len(list(SAMPLES.glob("*.png")))
    assert c.encode(iglob(f"{SAMPLES}/*.png")).shape == (count, DIM)  # noqa: PTH207


# Callbacks


class Calls:
    """Callbacks that note what they get."""

    def __init__(self) -> None:
        self.got: dict[str, list[Any]] = {"on_done": [], "on_error": [], "on_always": []}

    @property
    def arguments(self) -> dict[str, Callable[[Any], None]]:
        return {name: got.append for name, got in self.got.items()}

    @property
    def counts(self) -> list[int]:
        return [len(got) for got in self.got.values()]


def test_callbacks_are_called_for_each_request(c: Client) -> None:
    calls = Calls()
    assert c.encode([Document(text=text) for text in SENTENCES], batch_size=1,
                    **calls.arguments) is None  # fmt: skip
    assert calls.counts == [3, 0, 3]
    for response in calls.got["on_done"]:
        (document,) = response.docs
        assert document.text in SENTENCES
        assert document.embedding.shape == (DIM,)
        assert response.embeddings.shape == (1, DIM)
        assert [each.text for each in response.data.docs] == [document.text]
        assert isinstance(response.parameters, dict)


def test_callbacks_of_plain_strings(c: Client) -> None:
    found = []
    assert c.encode(SENTENCES, on_done=lambda docs: found.append(docs.docs.embeddings)) is None
    np.testing.assert_allclose(np.concatenate(found), c.encode(SENTENCES), atol=1e-5)


def test_callbacks_behave_like_documents(c: Client) -> None:
    found = []

    def store(docs: Any) -> None:
        assert len(docs) == 3
        found.extend(document.embedding for document in docs)

    c.encode([Document(text=text) for text in SENTENCES], on_done=store)
    np.testing.assert_allclose(np.stack(found), c.encode(SENTENCES), atol=1e-5)


def test_callbacks_of_rank(c: Client) -> None:
    calls = Calls()
    assert c.rank([image_to_sentences()], **calls.arguments) is None
    assert calls.counts == [1, 0, 1]
    assert texts(calls.got["on_done"][0].docs[0].matches)[0] == "a cat"


@pytest.mark.parametrize("call", ["encode", "aencode", "rank", "arank"])
def test_on_error_handles_the_error_of_a_request(fake: FakeServer, call: str) -> None:
    fake.error = ("INTERNAL", "division by zero")
    calls = Calls()
    with Client(fake.address) as client:
        answer = getattr(client, call)([image_to_sentences()], **calls.arguments)
        assert (asyncio.run(answer) if call.startswith("a") else answer) is None
    assert calls.counts == [0, 1, 1]


def test_on_error_is_not_for_a_broken_connection(unused_address: str) -> None:
    calls = Calls()
    with (
        Client(unused_address, connect_timeout=0.1) as client,
        pytest.raises(ConnectionFailedError),
    ):
        client.encode(SENTENCES, **calls.arguments)
    assert calls.counts == [0, 0, 0]


# Client parallelism


def test_threads_and_processes(c: Client) -> None:
    """clip-as-service's gRPC client worked in one thread alone."""
    expected = c.encode(SENTENCES)
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(c.encode, [SENTENCES] * 16):
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4)
    with pickle.loads(pickle.dumps(c)) as copy:
        np.testing.assert_allclose(copy.encode(SENTENCES), expected, rtol=1e-4, atol=1e-4)


# Parameters of a call


@pytest.mark.parametrize("call", ["encode", "aencode", "rank", "arank"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"drop_image_content": True},
        {"drop_image_content": False},
        {"minibatch_size": 2},
        {"batch_size": 2},
        {"access_paths": "@r"},
        {"traversal_paths": "@r"},
    ],
    ids=str,
)
def test_parameters(onnx_server: Server, call: str, parameters: dict[str, Any]) -> None:
    for address in onnx_server.addresses:
        sent = [image_to_sentences()]
        was = dict(parameters)
        with Client(address) as client:
            answer = getattr(client, call)(sent, parameters=parameters)
            result = asyncio.run(answer) if call.startswith("a") else answer
        assert parameters == was
        assert result[0] is sent[0]
        if "encode" in call:
            assert result[0].embedding.shape == (DIM,)


def test_access_paths_of_chunks_and_matches(c: Client) -> None:
    document = image_to_sentences()
    document.chunks = DocList[Match]([Match(uri=str(DOG)), Match(text="a dog")])
    (document,) = c.encode([document], parameters={"access_paths": "@c"})
    assert document.embedding is None
    assert rows(document.chunks).shape == (2, DIM)
    (document,) = c.encode([document], parameters={"access_paths": "@r,m"})
    assert document.embedding.shape == (DIM,)
    assert rows(document.matches).shape == (5, DIM)
