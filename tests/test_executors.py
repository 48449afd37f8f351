"""The executors without a server of ours: made in Python, or in a flow that names them."""

from __future__ import annotations

import asyncio
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import SAMPLES, Server, Start, flow, saved
from docarray import DocList
from docarray.documents import ImageDoc, TextDoc
from jina import Client as JinaClient
from PIL import Image

from clip_client import Client
from clip_server.errors import ConfigurationError, RequestError
from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.clip_hub import CLIPImageEncoder, CLIPTextEncoder
from clip_server.executors.clip_onnx import CLIPEncoder
from clip_server.executors.documents import ClipChunk, ClipDoc, ClipMatch

CAT, DOG = ((SAMPLES / f"{name}.png").read_bytes() for name in ("cat", "dog"))


def encoded(encoder: Any, docs: list[ClipDoc], **parameters: Any) -> DocList[ClipDoc]:
    return asyncio.run(encoder.encode(DocList[ClipDoc](docs), parameters))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def encoder() -> Any:
    made = CLIPEncoder("embedded", "cpu", 2)
    yield made
    made.close()


def test_parameters_by_place(encoder: CLIPEncoder) -> None:
    found = encoder.parameters
    assert (found.name, found.device, found.num_worker_preprocess) == ("embedded", "cpu", 2)
    with pytest.raises(TypeError, match="name twice"):
        CLIPEncoder("embedded", name="embedded")
    with pytest.raises(TypeError, match="at most 7 parameters by place: name, device"):
        CLIPEncoder(*"12345678")


def test_a_mistake_is_an_exception_and_not_the_end_of_the_process() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'minibatch_size'"):
        CLIPEncoder("embedded", minibatchsize=3)
    with pytest.raises(ConfigurationError, match="no model is named 'ViT-B-33'"):
        CLIPEncoder("ViT-B-33")


def test_ctrl_c_still_ends_the_callers_process(encoder: CLIPEncoder) -> None:
    assert not encoder.is_served
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_base_takes_the_runtime_that_is_installed() -> None:
    made = BaseCLIPEncoder("embedded")
    (doc,) = encoded(made, [ClipDoc(text="a cat")])
    assert doc.embedding.shape == (256,)
    made.close()


def test_encode_in_python_equals_the_server(encoder: CLIPEncoder, onnx_server: Server) -> None:
    docs = encoded(encoder, [ClipDoc(text="a cat"), ClipDoc(blob=CAT)], normalize=True)
    expected = Client(onnx_server.grpc).encode(["a cat", CAT], normalize=True)
    np.testing.assert_allclose([doc.embedding for doc in docs], expected, atol=1e-3)


def test_parameters_of_a_request(encoder: CLIPEncoder) -> None:
    chunks = DocList[ClipChunk]([ClipChunk(text="a cat"), ClipChunk(blob=CAT)])
    (doc,) = encoded(
        encoder,
        [ClipDoc(text="a dog", chunks=chunks)],
        access_paths="@c",
        minibatch_size=1,
        drop_image_content=True,
    )
    assert doc.embedding is None
    assert all(chunk.embedding.shape == (256,) for chunk in doc.chunks)
    assert doc.chunks[1].blob is None
    for paths in ("@r,c", ["@r", "@c"], ["r", "c"], "r,c"):
        (doc,) = encoded(encoder, [ClipDoc(text="a dog", chunks=chunks)], traversal_paths=paths)
        assert doc.embedding.shape == doc.chunks[0].embedding.shape == (256,)
    with pytest.raises(RequestError, match='unknown parameter "minibatchsize"'):
        encoded(encoder, [ClipDoc(text="a dog")], minibatchsize=1)


def test_rank_in_python(encoder: CLIPEncoder) -> None:
    matches = DocList[ClipMatch]([ClipMatch(blob=CAT), ClipMatch(blob=DOG)])
    docs = DocList[ClipDoc]([ClipDoc(text="a dog", matches=matches)])
    asyncio.run(encoder.rank(docs, {"drop_image_content": True}))
    best, other = docs[0].matches
    assert best.scores["clip_score"] > other.scores["clip_score"]
    assert best.blob is None


def pixels(kind: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(BytesIO(CAT)).convert(kind))


@pytest.mark.parametrize(
    ("tensor", "mode"),
    [
        (pixels("RGB"), "RGB"),
        (pixels("RGB").astype(np.float64), "RGB"),
        (pixels("RGB").astype(np.float32) / 255, "RGB"),
        (pixels("RGBA"), "RGBA"),
        (pixels("L"), "L"),
        (pixels("L").astype(np.int64)[:, :, None], "L"),
    ],
    ids=["uint8", "0 to 255", "0 to 1", "RGBA", "grey", "grey, one channel"],
)
def test_a_tensor_is_the_image_that_pil_makes_of_it(
    encoder: CLIPEncoder, tensor: np.ndarray[Any, Any], mode: str
) -> None:
    image = saved(Image.open(BytesIO(CAT)).convert(mode), "PNG")
    found, expected = encoded(encoder, [ClipDoc(tensor=tensor), ClipDoc(blob=image)])
    assert found.error is None
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-4)
    assert found.tensor is not None


def test_documents_of_other_classes(encoder: CLIPEncoder) -> None:
    text, image, empty = TextDoc(text="a cat"), ImageDoc(tensor=pixels("RGB")), TextDoc()
    asyncio.run(encoder.encode([text, image, empty]))  # type: ignore[arg-type]
    assert text.embedding.shape == image.embedding.shape == (256,)
    assert empty.embedding is None


def test_bad_documents_fail_alone(encoder: CLIPEncoder) -> None:
    bad = [ClipDoc(), ClipDoc(tensor=np.zeros((2, 3, 4, 5))), ClipDoc(uri="/etc/passwd")]
    *failed, good = encoded(encoder, [*bad, ClipDoc(text="a cat")])
    assert all(doc.error and doc.embedding is None for doc in failed)
    assert good.embedding.shape == (256,)


def test_max_length() -> None:
    made = CLIPEncoder("embedded", max_length=4)
    long, short = encoded(made, [ClipDoc(text="a cat on the mat"), ClipDoc(text="a cat")])
    np.testing.assert_array_equal(long.embedding, short.embedding)
    made.close()


# Jina Hub's encoders.


def mixed() -> list[ClipDoc]:
    chunks = DocList[ClipChunk](
        [ClipChunk(modality="text", text="a cat"), ClipChunk(modality="image", blob=CAT)]
    )
    uri = ClipDoc(uri="data:text/plain,a%20cat")
    return [ClipDoc(text="a cat"), ClipDoc(blob=CAT), ClipDoc(chunks=chunks), uri]


@pytest.mark.parametrize(("kind", "other"), [(CLIPTextEncoder, 1), (CLIPImageEncoder, 0)])
def test_an_encoder_of_one_modality_leaves_the_other_alone(kind: Any, other: int) -> None:
    made = kind(pretrained_model_name_or_path="embedded", batch_size=4, traversal_paths=["r"])
    docs = encoded(made, mixed())
    assert docs[other].embedding is None
    assert docs[other].error is None
    # The document with chunks has one embedding, of its only chunk of this modality.
    np.testing.assert_allclose(docs[2].embedding, docs[1 - other].embedding, atol=1e-4)
    assert (docs[3].embedding is None) == (kind is CLIPImageEncoder)
    assert docs[3].error is None
    docs = encoded(made, mixed(), traversal_paths="@c")
    assert [doc.embedding is None for doc in docs] == [True] * 4
    assert [chunk.embedding is None for chunk in docs[2].chunks] == [other == 0, other == 1]
    made.close()


def test_several_chunks_have_their_mean() -> None:
    made = CLIPImageEncoder("embedded")
    chunks = DocList[ClipChunk]([ClipChunk(blob=CAT), ClipChunk(tensor=pixels("RGB") // 2)])
    (doc,) = encoded(made, [ClipDoc(chunks=chunks)])
    mean = np.mean([chunk.embedding for chunk in doc.chunks], axis=0)
    np.testing.assert_allclose(doc.embedding, mean, atol=1e-6)
    made.close()


def test_tensors_that_are_preprocessed_already() -> None:
    made = CLIPImageEncoder("embedded", use_default_preprocessing=False)
    spec = made.engine.card.image
    image = Image.open(BytesIO(CAT)).convert("RGB").resize((spec.size, spec.size))
    ready = ((np.asarray(image) / 255 - spec.mean) / spec.std).transpose(2, 0, 1)
    docs = [ClipDoc(tensor=ready), ClipDoc(blob=saved(image, "PNG"))]
    found, expected = encoded(made, docs)
    np.testing.assert_allclose(found.embedding, expected.embedding, atol=1e-4)
    made.close()


def test_an_encoder_of_one_modality_takes_docarrays_own_documents() -> None:
    made = CLIPImageEncoder("embedded")
    text, image = TextDoc(text="a cat"), ImageDoc(tensor=pixels("RGB"))
    asyncio.run(made.encode([text, image]))  # type: ignore[arg-type]
    assert text.embedding is None
    assert image.embedding.shape == (256,)
    made.close()


@pytest.mark.parametrize("kind", [CLIPTextEncoder, CLIPImageEncoder])
def test_names_of_the_hugging_face_hub(kind: Any) -> None:
    def name(**given: Any) -> str:
        return str(kind.read_parameters(given).name)

    assert name() == "ViT-B-32::openai"
    large = "openai/clip-vit-large-patch14"
    assert name(pretrained_model_name_or_path=large, base_tokenizer_model=large) == (
        "ViT-L-14::openai"
    )
    assert name(model_name="ViT-B/16") == "ViT-B/16"
    with pytest.raises(ConfigurationError, match="base_tokenizer_model: 'bert-base-uncased'"):
        name(base_tokenizer_model="bert-base-uncased")
    with pytest.raises(ConfigurationError, match="use_default_preprocessing is neither"):
        name(use_default_preprocessing="no")


@pytest.mark.slow
def test_a_flow_with_both(start: Start, tmp_path: Path) -> None:
    """One by its `config.yml`, as older projects have it, one written into the flow."""
    parameters = {"pretrained_model_name_or_path": "embedded", "traversal_paths": "@r"}
    modules = {"py_modules": ["clip_server.executors.clip_hub"]}
    config = {"jtype": "CLIPImageEncoder", "with": parameters, "metas": modules}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    spec = flow()
    spec["executors"] = [
        {"name": "image", "uses": str(tmp_path / "config.yml")},
        {
            "name": "text",
            "uses": {
                "jtype": "CLIPTextEncoder",
                "with": {**parameters, "max_length": 77, "batch_size": 16},
                "metas": {"py_modules": ["clip_hub.py"]},
            },
        },
    ]
    server = start(spec)
    sent = DocList[ClipDoc]([*mixed(), ClipDoc(tensor=pixels("RGB"))])
    client = JinaClient(host="127.0.0.1", port=server.ports[0])
    docs = client.post("/", sent, return_type=DocList[ClipDoc])
    assert [doc.embedding.shape for doc in docs] == [(256,)] * 5
    assert not any(doc.error for doc in docs)
    embeddings = Client(server.http).encode(["a cat", CAT])
    np.testing.assert_allclose(embeddings, [docs[0].embedding, docs[1].embedding], atol=1e-3)
