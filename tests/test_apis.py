"""The APIs of other servers, by the bodies that they document.

Their own clients are in test_api_clients.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ROOT, SAMPLES, Http, Server
from numpy.typing import NDArray

from clip_client import Client
from clip_client.quantization import quantize
from clip_client.scores import normalize

CAT = (SAMPLES / "cat.png").read_bytes()
BASE64 = base64.b64encode(CAT).decode()
URI = f"data:image/png;base64,{BASE64}"
TEXTS = ["a cat", "a smiling dog"]


@pytest.fixture(scope="module")
def api(two_models: Server) -> Iterator[Http]:
    with Http(two_models.http) as session:
        yield session


@pytest.fixture(scope="module")
def unit(two_models: Server) -> dict[str, NDArray[np.float32]]:
    """Embeddings of the texts and the image, by model."""
    with Client(two_models.grpc) as client:
        return {
            name: client.encode([*TEXTS, CAT], normalize=True, model=name)
            for name in ("first", "second")
        }


def embeddings(answer: requests.Response) -> NDArray[np.float32]:
    assert answer.status_code == 200, answer.text
    return np.array([each["embedding"] for each in answer.json()["data"]], np.float32)


def close(found: Any, expected: NDArray[np.float32]) -> bool:
    return bool(np.allclose(np.array(found, np.float32), expected, rtol=1e-3, atol=1e-5))


def openai(api: Http, **body: Any) -> requests.Response:
    return api.post("/v1/embeddings", json=body)


def test_openai_embeds_a_text_or_several(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    for path in ("/v1/embeddings", "/embeddings"):
        answer = api.post(path, json={"model": "text-embedding-3-small", "input": TEXTS})
        assert close(embeddings(answer), unit["first"][:2])
        body = answer.json()
        assert body["object"] == "list"
        assert [(each["object"], each["index"]) for each in body["data"]] == [
            ("embedding", 0),
            ("embedding", 1),
        ]
        assert body["model"] == "emoji-small::embedded"
    one = openai(api, input="a cat")
    assert close(embeddings(one), unit["first"][:1])
    assert one.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}


def test_embeddings_in_every_form(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    coded = openai(api, input=TEXTS, encoding_format="base64").json()["data"]
    rows = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4") for each in coded]
    assert close(rows, unit["first"][:2])
    raw = np.array(rows)
    for form in ("int8", "uint8", "binary", "ubinary"):
        for name in ("encoding_format", "embedding_type", "encoding_type"):
            found = [
                each["embedding"]
                for each in openai(api, input=TEXTS, **{name: form}).json()["data"]
            ]
            np.testing.assert_array_equal(found, quantize(raw, form))
    assert openai(api, input=TEXTS, encoding_format="int4").status_code == 400
    (each,) = openai(api, input=TEXTS[:1], embedding_type=["float"]).json()["data"]
    assert close([each["embedding"]], rows[:1])
    several = openai(api, input=TEXTS, embedding_type=["base64", "ubinary"]).json()["data"]
    assert [list(each["embedding"]) for each in several] == [["base64", "ubinary"]] * 2
    decoded = [np.frombuffer(base64.b64decode(e["embedding"]["base64"]), "<f4") for e in several]
    assert close(np.array(decoded), raw)
    packed = [each["embedding"]["ubinary"] for each in several]
    np.testing.assert_array_equal(packed, quantize(raw, "ubinary"))
    for wrong in ([], ["float", "int4"], {"float": True}):
        assert openai(api, input=TEXTS, embedding_type=wrong).status_code == 400


def test_quantized_embeddings_follow_their_scheme() -> None:
    rows = np.array([[0.5, -1.0, 0.0, 0.25], [0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(quantize(rows, "int8"), [[64, -127, 0, 32], [0] * 4])
    np.testing.assert_array_equal(quantize(rows, "uint8"), [[192, 1, 128, 160], [128] * 4])
    np.testing.assert_array_equal(quantize(rows, "ubinary"), [[0b10010000], [0]])
    np.testing.assert_array_equal(quantize(rows, "binary"), [[16], [-128]])


def test_what_infinitys_clients_leave_out(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    """They send their defaults."""
    unset = {"model": "default/not-specified", "dimensions": 0}
    for modality, item, row in (("text", "a cat", 0), ("image", URI, 2)):
        answer = openai(api, input=[item], modality=modality, **unset)
        assert close(embeddings(answer), unit["first"][[row]])


def test_dimensions_of_matryoshka_models_alone(
    api: Http, unit: dict[str, NDArray[np.float32]]
) -> None:
    refused = openai(api, input=TEXTS, dimensions=64)
    assert refused.status_code == 400
    assert "only those of Matryoshka models" in refused.json()["error"]["message"]
    cut = embeddings(openai(api, model="small", input=TEXTS, dimensions=64))
    assert close(cut, normalize(unit["second"][:2, :64]))
    for dimensions in (65, 257, 0, -1, "64", 1.5, True):
        assert openai(api, model="small", input=TEXTS, dimensions=dimensions).status_code == 400


def test_images_in_every_dialect_of_openais_endpoint(
    api: Http, unit: dict[str, NDArray[np.float32]]
) -> None:
    image = unit["first"][2:]
    bodies: list[dict[str, Any]] = [
        {"input": URI},  # a bare string that begins with data:image/
        {"input": [URI], "modality": "image"},  # infinity
        {"input": [{"image": URI}]},  # Jina
        {"input": [{"image": BASE64}]},
        {"input": {"image": f"data:;base64,{BASE64}"}},  # an image by its place
        {"input": [{"image": f"data:application/octet-stream;base64,{BASE64}"}]},
        {"input": [{"bytes": BASE64}], "encoding_type": "float"},
        {"input": [{"url": URI}]},
        {"input": [URI], "messages": None},
        {  # vLLM
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URI}}]}
            ]
        },
    ]
    for body in bodies:
        answer = openai(api, **body)
        assert close(embeddings(answer), image), body
        assert answer.json()["usage"]["prompt_tokens"] == 0
    mixed = openai(api, input=[{"text": "a cat"}, {"image": URI}, URI, "a cat"])
    assert close(embeddings(mixed), unit["first"][[0, 2, 2, 0]])
    raw = embeddings(openai(api, input=[{"text": "a cat"}], normalized=False))
    assert np.linalg.norm(raw) > 2
    # infinity's modality goes before what a string looks like.
    text = embeddings(openai(api, input=[URI[:40]], modality="text"))
    assert not close(text, image)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"input": [[1, 2, 3]]}, "check_embedding_ctx_length=False"),
        ({"input": [1, 2, 3]}, "check_embedding_ctx_length=False"),
        ({"input": []}, "input"),
        ({}, "input"),
        ({"input": ["a cat", ""]}, "input[1]"),
        ({"input": ["a cat", None]}, "input[1] is null"),
        ({"input": ["a cat", 5]}, "input[1] is 5, which is not a string"),
        ({"input": [["a cat"]]}, 'input[0] is ["a cat"], which is not a string'),
        ({"input": [{"image": "data:text/plain,a%20cat"}]}, "input[0]"),
        ({"input": ["a cat", "data:image/png;base64,????"]}, "input[1]"),
        ({"input": [{"text": "a", "image": URI}]}, "input[0]"),
        ({"input": [{}]}, "input[0]"),
        ({"input": ["a", "\ud83d"]}, "input[1]"),
        ({"input": ["a cat"], "modality": "image"}, "input[0]"),
        ({"input": ["a cat"], "modality": "audio"}, "modality"),
        ({"input": ["a cat"], "late_chunking": True}, "late_chunking"),
        ({"input": ["a cat"], "model": 7}, "model"),
        ({"messages": [{"role": "user", "content": []}]}, "one part"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_url", "image_url": {"url": URI}},
                        ],
                    }
                ]
            },
            "one part",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio_url"}]}]}, "content[0]"),
    ],
)
def test_openais_errors(api: Http, body: dict[str, Any], why: str) -> None:
    answer = api.post(
        "/v1/embeddings", data=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert why in error["message"]
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        None,
        "invalid_argument",
    )


@pytest.mark.parametrize("field", ["input", "model", "messages", "modality", "dimensions"])
def test_values_nested_deeply_are_shown_shortened(api: Http, field: str) -> None:
    nested = f'{{"input": "a cat", "{field}": {"[" * 1000}{"]" * 1000}}}'
    answer = api.post("/v1/embeddings", data=nested)
    assert answer.status_code == 400
    assert len(answer.json()["error"]["message"]) < 300


def test_models_are_listed(api: Http) -> None:
    for prefix in ("/v1", ""):
        listed = api.get(f"{prefix}/models").json()
        first, second = listed["data"]
        assert listed["object"] == "list"
        assert first["id"] == "emoji-small::embedded"
        assert first["aliases"] == ["first", "text-embedding-3-small", "main"]
        # It serves the same model, so that name is the first one's.
        assert (second["id"], second["aliases"]) == ("second", ["second", "small"])
        assert {"object": "model", "owned_by": "clip-microservice"}.items() <= first.items()
        for each in (first, second):
            assert api.get(f"{prefix}/models/{each['id']}").json() == each
        assert api.get(f"{prefix}/models/third").status_code == 404


def calls(model: str | None) -> dict[str, tuple[str, dict[str, Any]]]:
    """A request of each dialect for the embedding of a text."""
    named = {} if model is None else {"model": model}
    return {
        "OpenAI": ("/v1/embeddings", {"json": {"input": ["a cat"], **named}}),
        "Cohere": ("/v2/embed", {"json": {"texts": ["a cat"], **named}}),
        "TEI": ("/embed", {"json": {"inputs": "a cat", **named}}),
        "Hugging Face": ("/", {"json": {"inputs": "a cat", **named}}),
        "Weaviate": ("/vectorize", {"json": {"texts": ["a cat"], **named}}),
        "Immich": (
            "/predict",
            {
                "data": {
                    "entries": json.dumps({"clip": {"textual": {"modelName": model}}}),
                    "text": "a cat",
                },
                "files": {},
            },
        ),
    }


def embedding_of(content: Any) -> Any:
    """The one embedding in an answer of any dialect."""
    if isinstance(content, list):
        return content[0]
    if "clip" in content:
        return json.loads(content["clip"])
    if "textVectors" in content:
        return content["textVectors"][0]
    if "embeddings" in content:
        return content["embeddings"]["float"][0]
    return content["data"][0]["embedding"]


def multipart(options: dict[str, Any]) -> dict[str, Any]:
    """A form as Immich sends it, in parts even without a file."""
    if "data" not in options:
        return options
    return {"files": {name: (None, value) for name, value in options["data"].items()}}


@pytest.mark.parametrize("dialect", calls(None))
def test_every_dialect_chooses_a_model(
    api: Http, unit: dict[str, NDArray[np.float32]], dialect: str
) -> None:
    for names, model in (
        ((None, "", "main", "first", "emoji-small__embedded"), "first"),
        (("small", "second"), "second"),
    ):
        for name in names:
            path, options = calls(name)[dialect]
            answer = api.post(path, **multipart(options))
            assert answer.status_code == 200, answer.text
            assert close(embedding_of(answer.json()), unit[model][0])
    path, options = calls("third")[dialect]
    answer = api.post(path, **multipart(options))
    assert answer.status_code == 404
    assert "'third'" in answer.text
    assert "second, small" in answer.text


def test_cohere(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    forms = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
    answer = api.post(
        "/v2/embed",
        json={
            "model": "main",
            "input_type": "search_query",
            "texts": TEXTS,
            "embedding_types": forms,
        },
    ).json()
    assert list(answer["embeddings"]) == forms
    assert close(answer["embeddings"]["float"], unit["first"][:2])
    assert answer["texts"] == TEXTS
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["billed_units"]["input_tokens"] > 4
    content = [{"type": "image_url", "image_url": {"url": URI}}]
    for body in ({"images": [URI]}, {"inputs": [{"content": content}]}):
        answer = api.post("/v2/embed", json={"input_type": "image", **body}).json()
        assert close(answer["embeddings"]["float"], unit["first"][2:])
        assert answer["texts"] == []
        assert answer["meta"]["billed_units"] == {"input_tokens": 0, "images": 1}
    for body, why in (
        ({}, "exactly one"),
        ({"texts": []}, "exactly one"),
        ({"texts": ["a"], "images": [URI]}, "exactly one"),
        ({"texts": ["a", ""]}, "texts[1]"),
        ({"images": [URI, "data:image/png;base64,????"]}, "images[1]"),
        ({"inputs": [{"content": [*content, *content]}]}, "inputs[0]"),
        ({"texts": ["a"], "embedding_types": ["int4"]}, "embedding_types"),
        ({"texts": ["a"], "truncate": "START"}, "truncate"),
        ({"texts": ["a", "a " * 200], "truncate": "NONE"}, "texts[1]: longer than the model"),
        ({"texts": ["a"], "output_dimension": 64}, "Matryoshka"),
        ({"texts": ["a"], "input_type": "poem"}, "input_type"),
    ):
        refused = api.post("/v2/embed", json=body)
        assert refused.status_code == 400
        assert why in refused.json()["message"]


def test_tei(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    for path in ("/embed", "/"):
        found = api.post(path, json={"inputs": [*TEXTS, URI], "truncate": True}).json()
        assert close(found, unit["first"])
    raw = api.post("/embed", json={"inputs": "a cat", "normalize": False}).json()
    assert np.linalg.norm(raw[0]) > 2
    info = api.get("/info").json()
    assert info["model_id"] == info["model"] == "emoji-small::embedded"
    assert info["max_input_length"] == 77
    assert api.get("/health").status_code == 200
    for body, why in (
        ({"inputs": []}, "inputs"),
        ({"inputs": [[1, 2]]}, "token ids"),
        ({"inputs": ["a", ""]}, "inputs[1]"),
        ({"inputs": "a " * 200, "truncate": False}, "inputs: longer than the model reads"),
        ({"inputs": ["a", *["a " * 200] * 5], "truncate": False}, "inputs[3] and 2 more: longer"),
        ({"inputs": "a", "prompt_name": "query"}, "prompt_name"),
        ({"inputs": "a", "truncation_direction": "Left"}, "truncation_direction"),
    ):
        refused = api.post("/embed", json=body)
        assert refused.status_code == 400
        assert refused.json()["error_type"] == "Validation"
        assert why in refused.json()["error"]


def test_errors_have_the_form_of_the_api(api: Http) -> None:
    """Those too that say nothing of the body."""
    wrong_encoding = {"headers": {"content-encoding": "br"}}
    forms: dict[str, Callable[[Any], str]] = {
        "/v1/embeddings": lambda content: content["error"]["message"],
        "/embeddings": lambda content: content["error"]["message"],
        "/v2/embed": lambda content: content["message"],
        "/embed": lambda content: content["error"],
        "/vectorize": lambda content: content["error"],
        "/predict": lambda content: content["detail"],
    }
    for path, message in forms.items():
        for method, options, status in (
            ("GET", {}, 405),
            ("POST", wrong_encoding, 415),
            ("POST", {"data": b"{"}, 400),
            ("POST", {"data": b"[]"}, 400),
        ):
            answer = api.request(method, path, **options)
            assert answer.status_code == status
            assert len(message(answer.json())) > 10
    for method, path in (("GET", "/v1/threads"), ("POST", "/v1/chat/completions")):
        answer = api.request(method, path, json={"messages": []})
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            None,
            "not_found",
        )
    assert "no POST /v2/rerank here" in api.post("/v2/rerank", json={}).json()["message"]
    error = api.get("/models/third").json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_the_contract_is_published(api: Http) -> None:
    assert api.get("/clip.proto").text == (ROOT / "clip_client/proto/clip.proto").read_text("utf-8")


def test_weaviate(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    answer = api.post("/vectorize", json={"texts": TEXTS, "images": [BASE64]}).json()
    assert close(answer["textVectors"], unit["first"][:2])
    assert close(answer["imageVectors"], unit["first"][2:])
    assert api.post("/vectorize", json={"texts": [], "images": []}).json() == {
        "textVectors": [],
        "imageVectors": [],
    }
    for path in ("/.well-known/live", "/.well-known/ready"):
        assert api.get(path).status_code == 204
    assert api.get("/meta").json()["models"] == ["emoji-small::embedded", "second"]
    for body, why in (({}, "texts"), ({"texts": "a"}, "texts"), ({"images": ["!"]}, "images[0]")):
        refused = api.post("/vectorize", json=body)
        assert refused.status_code == 400
        assert why in refused.json()["error"]


def test_immich(api: Http, unit: dict[str, NDArray[np.float32]]) -> None:
    entries = json.dumps({"clip": {"visual": {"modelName": "emoji-small__embedded"}}})
    found = api.post(
        "/predict", data={"entries": entries}, files={"image": ("cat.png", CAT)}
    ).json()
    assert close(json.loads(found["clip"]), unit["first"][2])
    assert api.get("/ping").text == "pong"
    text = json.dumps({"clip": {"textual": {"modelName": "main"}}})
    for sent, why in (
        ({"entries": json.dumps({"facial-recognition": {}})}, "faces"),
        ({"entries": json.dumps({"ocr": {}, "clip": {"visual": {}}})}, "OCR"),
        ({"entries": entries, "image": "no image"}, "image"),
        ({"entries": entries}, "no image"),
        ({"entries": text}, "no text"),
        ({"text": "a cat"}, "entries"),
    ):
        refused = api.post("/predict", files={name: (None, value) for name, value in sent.items()})
        assert refused.status_code == 400
        assert why in refused.json()["detail"]
    assert api.post("/predict", json={"entries": entries}).status_code == 400


@pytest.mark.parametrize(
    "uri",
    [
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "ftp://127.0.0.1/cat.png",
        "/etc/passwd",
    ],
)
def test_no_dialect_opens_other_uris(api: Http, sample_url: str, uri: str) -> None:
    for at in (uri, sample_url):
        part = {"type": "image_url", "image_url": {"url": at}}
        for path, body in (
            ("/v1/embeddings", {"input": [{"image": at}]}),
            ("/v1/embeddings", {"input": [{"url": at}]}),
            ("/v1/embeddings", {"input": [at], "modality": "image"}),
            ("/v1/embeddings", {"messages": [{"role": "user", "content": [part]}]}),
            ("/v2/embed", {"images": [at]}),
            ("/v2/embed", {"inputs": [{"content": [part]}]}),
            ("/vectorize", {"images": [at]}),
        ):
            assert api.post(path, json=body).status_code == 400, body


def test_too_much_is_refused_in_every_dialect(api: Http) -> None:
    many = ["a"] * 10_001
    for path, body in (
        ("/v1/embeddings", {"input": many}),
        ("/v2/embed", {"texts": many}),
        ("/embed", {"inputs": many}),
        ("/vectorize", {"texts": many}),
    ):
        answer = api.post(path, json=body)
        assert answer.status_code == 400
        assert "10,001 items" in answer.text
    large = "data:image/png;base64," + "A" * (45 << 20)
    assert "input[0]" in openai(api, input=[{"image": large}]).json()["error"]["message"]
