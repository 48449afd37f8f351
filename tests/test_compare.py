"""`python -m clip_server.compare`: the verdict on an index that another server made."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Server

from clip_client import Client, ItemsError
from clip_server.compare import probes
from clip_server.compare.__main__ import main
from clip_server.compare.agreement import Verdict, agreement, verdict
from clip_server.models import zoo
from clip_server.preprocess.image import ImageTransform

# The JSON of an answer, and its status.
Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]
# The embedded model's.
DIM = 256


@contextmanager
def fake_server(answer: Answer) -> Iterator[str]:
    """A server that answers a POST by its path and body, and a GET by its path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["content-length"] or 0))
            try:
                status, content = answer(self.path, json.loads(sent or "{}"))
            except ConnectionError:
                return
            if self.headers["authorization"] == "Bearer wrong":
                status, content = 401, {"error": "no"}
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Keeps the test's output short."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def other_model(dim: int) -> AbstractContextManager[str]:
    """infinity's routes, over a model that embeds everything at random."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/embeddings":
            return 404, {"detail": "Not Found"}
        (content,) = body["input"]
        if body.get("modality") == "image" and len(content) < 100:
            return 400, {"error": {"message": "not an image"}}
        seed = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "big")
        embedding = np.random.default_rng(seed).standard_normal(dim)
        return 200, {"data": [{"embedding": embedding.tolist()}]}

    return fake_server(answer)


def text_server(client: Client, scale: float = 1) -> AbstractContextManager[str]:
    """TEI's route over our model, which reads any string as a text, and refuses long ones."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/embed":
            return 404, {}
        (content,) = body["inputs"]
        if content.startswith("data:"):
            content = content[:30]
        if len(content) > 300:
            return 413, {"error": "the text is too long", "error_type": "Validation"}
        return 200, (scale * client.encode([{"text": content}])).tolist()

    return fake_server(answer)


def clip_as_service(client: Client) -> AbstractContextManager[str]:
    """The one route of clip-as-service over HTTP, which fails a request for its bad document."""

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path != "/post" or body["execEndpoint"] != "/":
            return 404, {"detail": "Not Found"}
        try:
            (embedding,) = client.encode(body["data"])
        except ItemsError as error:
            return 500, {"header": {"status": {"description": str(error)}}}
        return 200, {"data": [{"embedding": embedding.tolist()}]}

    return fake_server(answer)


def compare(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and what the command writes as JSON."""
    file = tmp_path / "report.json"
    status = main([*arguments, "--json", str(file)])
    report: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return status, report


@pytest.mark.parametrize("api", [None, "openai", "tei"])
def test_our_own_server_is_kept_by_every_api(
    onnx_server: Server, tmp_path: Path, api: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--api", api] if api else []
    status, report = compare(tmp_path, onnx_server.http, "--with", onnx_server.grpc, *arguments)
    assert (status, report["verdict"]) == (0, "keep")
    assert report["api"] == (api or "clip")
    assert report["normalized"] is (api is not None)
    texts, images = report["agreement"]
    assert (texts["items"], images["items"]) == (len(probes.TEXTS), len(probes.images()))
    assert min(texts["least"], images["least"]) > 0.99999
    output = capsys.readouterr()
    assert output.err == ""
    assert "| images |    12 | 1.000000 |" in output.out
    assert output.out.endswith("Verdict: keep\n")


def test_a_model_in_this_process_is_compared_with_a_server_over_grpc(
    onnx_server: Server, tmp_path: Path
) -> None:
    ours = ("--name", "embedded", "--runtime", "onnx", "--device", "cpu", "--threads", "1")
    status, report = compare(tmp_path, onnx_server.grpc, *ours)
    assert (status, report["verdict"], report["api"]) == (0, "keep", "clip")
    assert [each["kind"] for each in report["agreement"]] == ["texts", "images"]


def test_an_index_of_clip_as_service_is_kept(onnx_server: Server, tmp_path: Path) -> None:
    with Client(onnx_server.grpc) as client, clip_as_service(client) as url:
        status, report = compare(tmp_path, url, "--with", onnx_server.websocket)
    assert (status, report["verdict"], report["api"]) == (0, "keep", "clip")
    assert [each["kind"] for each in report["agreement"]] == ["texts", "images"]


def test_an_index_of_another_model_is_made_again(
    onnx_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_model(DIM) as url:
        status, report = compare(tmp_path, url, "--with", onnx_server.grpc)
    assert (status, report["verdict"], report["api"]) == (1, "index again", "openai")
    assert not report["normalized"]
    assert [each["least"] < 0.99 for each in report["agreement"]] == [True, True]
    assert "The least cosine is that of" in capsys.readouterr().out


def test_other_dimensions_are_of_another_model(
    onnx_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with other_model(384) as url:
        status, report = compare(tmp_path, url, "--with", onnx_server.grpc)
    assert (status, report["verdict"]) == (1, "index again")
    assert report["dimensions"] == {"theirs": 384, "ours": DIM}
    assert "384 dimensions" in capsys.readouterr().out


def test_a_server_of_texts_is_compared_by_texts(
    onnx_server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It embeds `data:` URIs as texts, and the texts that it refuses are left out."""
    with Client(onnx_server.grpc) as client, text_server(client, scale=3) as url:
        status, report = compare(tmp_path, url, "--with", onnx_server.grpc)
    (texts,) = report["agreement"]
    assert (texts["kind"], texts["items"]) == ("texts", len(probes.TEXTS) - 1)
    assert "reads data: URIs as texts" in report["without_images"]
    assert report["api"] == "tei"
    # Its length is compared, too, which changes no cosine.
    assert not report["normalized"]
    assert (status, report["verdict"]) == (0, "keep")
    output = capsys.readouterr()
    assert "Only texts were compared" in output.out
    assert "left out: the text 'a long description" in output.err
    assert "413" in output.err


def openai_server(client: Client, image_of: Callable[[Any], str]) -> AbstractContextManager[str]:
    """OpenAI's route over our model. It asks for the model's name.

    image_of: the `data:` URI in a body; raises LookupError or TypeError where there is none.
    """

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": "theirs"}, {"id": "another"}]}
        if path != "/v1/embeddings":
            raise ConnectionError  # it ends without an answer
        if body.get("model") != "theirs":
            return 400, {"error": {"message": "no such model"}}
        try:
            item = {"uri": image_of(body)}
        except (LookupError, TypeError):
            (content,) = body.get("input", [None])
            if not isinstance(content, str) or len(content) > 2000:
                return 400, {"error": {"message": "not a text"}}
            item = {"text": content}
        try:
            (embedding,) = client.encode([item])
        except ItemsError as error:
            return 400, {"error": {"message": str(error)}}
        return 200, {"data": [{"embedding": embedding.tolist()}]}

    return fake_server(answer)


@pytest.mark.parametrize(
    "image_of",
    [
        lambda body: body["input"][0]["image"],
        lambda body: body["messages"][0]["content"][0]["image_url"]["url"],
    ],
    ids=["jina", "vllm"],
)
def test_servers_that_ask_for_a_model_and_have_their_own_way_of_images(
    onnx_server: Server, tmp_path: Path, image_of: Callable[[Any], str]
) -> None:
    with Client(onnx_server.grpc) as client, openai_server(client, image_of) as url:
        status, report = compare(tmp_path, url, "--with", onnx_server.grpc)
    assert (status, report["verdict"], report["api"]) == (0, "keep", "openai")
    assert [each["kind"] for each in report["agreement"]] == ["texts", "images"]


def test_what_cannot_be_compared_is_said_in_one_line(
    onnx_server: Server, unused_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(_: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (200, "hello") if "inputs" in body else (500, {"error": "out of memory"})

    with fake_server(nothing) as url:
        for arguments, expected in (
            ([unused_address.replace("grpc", "http")], "cannot be reached"),
            (["http://[127.0.0.1"], "invalid"),
            (["tcp://127.0.0.1:1"], "tcp"),
            ([url], "HTTP 500"),
            ([url, "--api", "tei"], "not an embedding"),
            ([url, "--key", "wrong"], "refused the key"),
            ([url, "--api", "openai", "--model", "theirs"], "out of memory"),
            ([onnx_server.http, "--with", "tcp://127.0.0.1:1"], "tcp"),
            ([onnx_server.http, "--name", "no-such-model"], "no-such-model"),
            ([onnx_server.http, "--model", "no-such-model"], "no-such-model"),
            ([onnx_server.http, "--dtype", "fp32,int8"], "one precision"),
        ):
            assert main(arguments) == 2
            output = capsys.readouterr()
            assert output.out == ""
            (line,) = output.err.splitlines()
            assert line.startswith("clip_server.compare: ")
            assert expected in line


def test_an_image_is_so_large_that_exact_decoding_matters() -> None:
    """Else a difference between the servers' decoding would stay hidden."""
    spec = zoo.resolve("embedded").image
    image = probes.images()[-1]
    assert (ImageTransform(spec)(image) != ImageTransform(spec, exact=True)(image)).any()


@pytest.mark.parametrize(
    ("cosine", "expected"),
    [
        (0.9995, Verdict.KEEP),
        (0.995, Verdict.MEASURE),
        (0.98, Verdict.INDEX_AGAIN),
        (-1, Verdict.INDEX_AGAIN),
    ],
)
def test_the_least_cosine_decides(cosine: float, expected: Verdict) -> None:
    ours = np.array([[1, 0], [1, 0], [0, 2]], np.float32)
    theirs = np.array([[3, 0], [np.nan, np.nan], [np.sqrt(1 - cosine**2), cosine]], np.float32)
    found = agreement("texts", theirs, ours)
    assert (found.items, found.lowest_index) == (2, 2)
    assert found.least == pytest.approx(cosine, abs=1e-6)
    assert verdict([found]) is expected
