"""Graphs that others exported: folders and repositories of Immich and transformers.js are served as
they are, with the embeddings of the checkpoints that they were made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import seeded
from cn_clip_reference import drawn, picture
from conftest import Start, flow, saved
from exported import Pixels, Tensors, load_int8, write_immich, write_transformers_js
from test_hub import Hub, run, serve
from test_models_parity import SIGLIP_TEXT, VIT, config
from test_tokenizer_hugging_face import t5 as write_tokenizer

from clip_client import Client
from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec
from clip_server.models import zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import graph, registry

CLIP = seeded.SMALL_CLIP
SIGLIP = config(
    VIT,
    SIGLIP_TEXT | {"hf_tokenizer_name": "here", "tokenizer_kwargs": {"clean": "canonicalize"}},
    custom_text=True,
    init_logit_bias=-10,
)
HALVES: tuple[float, float, float] = (0.5, 0.5, 0.5)
IMAGE = ImageSpec(64)
SQUASHED = ImageSpec(64, HALVES, HALVES, resize="squash", interpolation="bilinear")
TEXTS = ["a cat", "A Photo, of a small dog!", "the end"]
# As transformers writes them.
CLIP_CONFIG = {
    "model_type": "clip",
    "projection_dim": 32,
    "text_config": {"model_type": "clip_text_model"},
    "vision_config": {"image_size": 64},
}
CLIP_IMAGES = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
SIGLIP_CONFIG = {
    "model_type": "siglip",
    "text_config": {"max_position_embeddings": 20, "vocab_size": 600},
    "vision_config": {"image_size": 64},
}
SIGLIP_IMAGES = {
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "image_mean": HALVES,
    "image_std": HALVES,
}


def tensors_of(described: dict[str, Any]) -> Tensors:
    return drawn(registry.tensor_shapes(described))


def tokens_of(runtime: OnnxRuntime) -> Any:
    tokenizer = tokenizer_for(runtime.card.text)
    return pad([tokenizer.encode(text) for text in TEXTS], tokenizer.spec)


def expected(described: dict[str, Any], tensors: Tensors, image: ImageSpec, feed: Any) -> Any:
    """The embeddings of our own graph."""
    from test_graph import session

    if "pixels" in feed:
        return session(graph.build_visual(described, tensors, image)).run(None, feed)[0]
    return session(graph.build_textual(described, tensors)).run(None, feed)[0]


def assert_served(
    folder: Path | str, described: dict[str, Any], tensors: Tensors, image: ImageSpec, **load: Any
) -> OnnxRuntime:
    runtime = OnnxRuntime.load("mine", model_path=folder, **load)
    card = runtime.card
    assert (card.name, card.dim) == ("mine", described["embed_dim"])
    assert (card.image.mean, card.image.std) == (image.mean, image.std)
    assert (card.image.size, card.image.resize) == (image.size, image.resize)
    assert card.image.interpolation == image.interpolation
    pixels, tokens = seeded.random_pixels(described, 3), tokens_of(runtime)
    found = runtime.encode_image(pixels), runtime.encode_text(tokens)
    feeds = {"pixels": pixels}, {"tokens": tokens}
    for rows, feed in zip(found, feeds, strict=True):
        assert seeded.relative(rows, expected(described, tensors, image, feed)) < 1e-4
    return runtime


@pytest.mark.parametrize(
    ("pixels", "external"), [("float", True), ("uint8", False), ("channels last", False)]
)
def test_immichs_folder_of_clip(pixels: Pixels, external: bool, tmp_path: Path) -> None:
    tensors = tensors_of(CLIP)
    write_immich(tmp_path, CLIP, tensors, image=IMAGE, pixels=pixels, external=external)
    runtime = assert_served(tmp_path, CLIP, tensors, IMAGE)
    assert runtime.card.text.tokenizer is None


def test_immichs_folder_of_siglip(tmp_path: Path) -> None:
    tensors = tensors_of(SIGLIP)
    write_tokenizer(tmp_path)
    folder = tmp_path / "ViT-B-16-SigLIP2__webli"
    write_immich(folder, SIGLIP, tensors, image=SQUASHED, tokenizer=tmp_path)
    card = assert_served(folder, SIGLIP, tensors, SQUASHED).card
    assert (card.text.tokenizer, card.text.pad_id) == (str(folder / "textual"), 1)
    assert (card.text.clean, card.text.trim, card.logit_bias) == ("canonicalize", "fixed", -10)


def test_immichs_folder_of_m_clip(tmp_path: Path) -> None:
    """Its text tower has another tokenizer than its configuration says, and asks for a mask."""
    described = CLIP | {"text_cfg": CLIP["text_cfg"] | {"no_causal_mask": True}}
    tensors = tensors_of(described)
    write_tokenizer(tmp_path)
    folder = tmp_path / "LABSE-Vit-L-14"
    write_immich(folder, described, tensors, image=IMAGE, mask=True, tokenizer=tmp_path)
    runtime = OnnxRuntime.load("mine", model_path=folder)
    tokens = tokens_of(runtime)
    whole = np.pad(tokens, ((0, 0), (0, 77 - tokens.shape[1])), constant_values=1)
    rows = expected(described, tensors, IMAGE, {"tokens": whole})
    rows = rows * (whole != 1).sum(axis=1, keepdims=True)
    assert seeded.relative(runtime.encode_text(tokens), rows) < 1e-4


@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
def test_transformers_js_folder_of_clip(mask: bool, tmp_path: Path) -> None:
    tensors = tensors_of(CLIP)
    write_transformers_js(
        tmp_path, CLIP, tensors, image=IMAGE, described=CLIP_CONFIG, preprocessor=CLIP_IMAGES,
        mask=mask,
    )  # fmt: skip
    if not mask:
        assert assert_served(tmp_path, CLIP, tensors, IMAGE).card.text.tokenizer is None
        return
    runtime = OnnxRuntime.load("mine", model_path=tmp_path)
    tokens = tokens_of(runtime)
    counts = (tokens.argmax(axis=1) + 1)[:, np.newaxis]
    rows = expected(CLIP, tensors, IMAGE, {"tokens": tokens}) * counts
    assert seeded.relative(runtime.encode_text(tokens), rows) < 1e-4


def test_transformers_js_folder_of_siglip(tmp_path: Path) -> None:
    tensors = tensors_of(SIGLIP)
    write_tokenizer(tmp_path)
    write_transformers_js(
        tmp_path, SIGLIP, tensors, image=SQUASHED, described=SIGLIP_CONFIG,
        preprocessor=SIGLIP_IMAGES,
    )  # fmt: skip
    card = assert_served(tmp_path, SIGLIP, tensors, SQUASHED).card
    assert (card.text.tokenizer, card.text.clean) == (str(tmp_path), "none")
    assert (card.text.context_length, card.text.trim, card.logit_bias) == (20, "fixed", -10)


def test_transformers_js_folder_of_a_type_without_a_checkpoint(tmp_path: Path) -> None:
    """The towers of jina-clip are not built, but their graphs are served."""
    tensors = tensors_of(CLIP)
    write_tokenizer(tmp_path)
    write_transformers_js(
        tmp_path, CLIP, tensors, image=IMAGE, preprocessor={"size": 64},
        described=CLIP_CONFIG | {
            "model_type": "jina_clip", "text_config": {"max_position_embeddings": 77}
        },
    )  # fmt: skip
    text = assert_served(tmp_path, CLIP, tensors, IMAGE).card.text
    assert (text.tokenizer, text.trim, text.context_length) == (str(tmp_path), "masked", 77)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_transformers_js(
        tmp_path_factory.mktemp("variants"),
        CLIP,
        tensors_of(CLIP),
        image=IMAGE,
        described=CLIP_CONFIG,
        preprocessor=CLIP_IMAGES,
        precisions={"_fp16": "fp16", "_quantized": "int8"},
    )


def test_the_precision_chooses_the_variant(variants: Path) -> None:
    pixels, tensors = seeded.random_pixels(CLIP, 2), tensors_of(CLIP)
    exact = expected(CLIP, tensors, IMAGE, {"pixels": pixels})
    differences = []
    for wanted, found in ((None, "fp16"), ("fp16", "fp16"), ("int8", "int8")):
        runtime = OnnxRuntime.load("mine", model_path=variants, precision=wanted)
        assert runtime.precision == found
        differences.append(seeded.relative(runtime.encode_image(pixels), exact))
    assert differences[0] == differences[1] < 1e-2 < differences[2] < 0.2


def test_a_missing_variant_is_refused(variants: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        OnnxRuntime.load("mine", model_path=variants, precision="fp32")
    assert "only the graphs onnx/text_model_fp16.onnx, onnx/text_model_quantized.onnx" in str(
        caught.value
    )
    assert "onnx/vision_model.onnx and onnx/text_model.onnx" in str(caught.value)


def test_one_graph_for_both_towers_is_refused(variants: Path, tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(CLIP_CONFIG))
    (tmp_path / "onnx/model.onnx").write_bytes(
        (variants / "onnx/text_model_fp16.onnx").read_bytes()
    )
    with pytest.raises(ConfigurationError, match=r"only the graphs onnx/model\.onnx; the ONNX"):
        OnnxRuntime.load("mine", model_path=tmp_path)


def test_a_graph_that_does_not_fit_its_description_is_refused(tmp_path: Path) -> None:
    write_immich(tmp_path, CLIP, tensors_of(CLIP), image=IMAGE)
    shutil.copy(tmp_path / "textual/model.onnx", tmp_path / "visual/model.onnx")
    message = r"visual/model\.onnx has the inputs text int32 \[1, 77\]; expected a single input of"
    with pytest.raises(ConfigurationError, match=message):
        OnnxRuntime.load("mine", model_path=tmp_path)


def test_a_folder_of_graphs_is_no_checkpoint(tmp_path: Path) -> None:
    """As for other runtimes, and for the convert command."""
    write_immich(tmp_path, CLIP, tensors_of(CLIP), image=IMAGE)
    with pytest.raises(ConfigurationError) as caught:
        zoo.checkpoint("mine", tmp_path)
    assert "only the graphs textual/model.onnx, visual/model.onnx" in str(caught.value)
    assert "the ONNX runtime serves" in str(caught.value)


def test_immichs_names_are_those_of_the_models() -> None:
    for name, known in {
        "ViT-B-16-SigLIP2__webli": "ViT-B-16-SigLIP2::webli",
        "ViT-B-32__openai": "ViT-B-32::openai",
        "ViT-B-32__laion2b-s34b-b79k": "ViT-B-32::laion2b_s34b_b79k",
        "XLM-Roberta-Large-Vit-B-16Plus": "M-CLIP/XLM-Roberta-Large-Vit-B-16Plus",
    }.items():
        assert zoo.resolve(name) == zoo.resolve(known)


@pytest.fixture(scope="module")
def repositories(variants: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a repository of each kind."""
    folder = tmp_path_factory.mktemp("hub")
    write_tokenizer(folder)
    tensors = tensors_of(SIGLIP)
    write_immich(
        folder / "immich-app/ViT-B-16-SigLIP2__webli",
        SIGLIP,
        tensors,
        image=SQUASHED,
        external=True,
        tokenizer=folder,
    )
    (folder / "Xenova").mkdir()
    (folder / "Xenova/clip-vit-base-patch32").symlink_to(variants)
    files = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for owner in ("immich-app", "Xenova")
        for repository in (folder / owner).iterdir()
        for file in repository.rglob("*")
        if file.is_file()
    }
    with serve(files) as hub:
        yield hub


def test_immichs_repository_is_served(repositories: Hub, start: Start, tmp_path: Path) -> None:
    name = "immich-app/ViT-B-16-SigLIP2__webli"
    server = start(
        flow("onnx", name=name, exact=True),
        HF_HOME=str(tmp_path),
        HF_ENDPOINT=repositories.url,
    )
    image = saved(picture(80, 64), "PNG")
    form = {"entries": json.dumps({"clip": {"textual": {"modelName": name.partition("/")[2]}}})}
    with Client(server.grpc) as client:
        embeddings = client.encode([*TEXTS, image])
        assert client.info().model == name
    parts = {key: (None, value) for key, value in {**form, "text": TEXTS[0]}.items()}
    answer = requests.post(f"{server.http}/predict", files=parts, timeout=30)
    normalised = embeddings[0] / np.linalg.norm(embeddings[0])
    np.testing.assert_allclose(json.loads(answer.json()["clip"]), normalised, rtol=1e-3)
    # The same from the folder in the cache, without another request.
    count = len(repositories.requests)
    (snapshot,) = tmp_path.glob("hub/models--immich-app--*/snapshots/*")
    runtime = OnnxRuntime.load("mine", model_path=snapshot)
    tokens = {"tokens": tokens_of(runtime)}
    pixels = {"pixels": ImageTransform(SQUASHED, exact=True)(image)[None]}
    tensors = tensors_of(SIGLIP)
    for rows, feed in ((embeddings[:-1], tokens), (embeddings[-1:], pixels)):
        assert seeded.relative(rows, expected(SIGLIP, tensors, SQUASHED, feed)) < 1e-4
    assert len(repositories.requests) == count


def test_transformers_js_repository_gives_the_wanted_precision_alone(
    repositories: Hub, tmp_path: Path
) -> None:
    name, url = "Xenova/clip-vit-base-patch32", repositories.url
    assert run(load_int8, name, tmp_path, url).stdout.strip() == "('int8', 32)"
    fetched = {request.rpartition("/")[2] for request in repositories.requests if "GET" in request}
    assert {"text_model_quantized.onnx", "vision_model_quantized.onnx"} <= fetched
    assert not {"text_model_fp16.onnx", "vision_model_fp16.onnx"} & fetched
    count = len(repositories.requests)
    again = run(load_int8, name, tmp_path, url, HF_HUB_OFFLINE="1")
    assert again.stdout.strip() == "('int8', 32)"
    assert len(repositories.requests) == count
    wanted = run(zoo.checkpoint, name, tmp_path, url).stdout
    assert "cannot get pytorch_model.bin of Xenova/clip-vit-base-patch32" in wanted
    assert "the ONNX runtime serves visual/model.onnx and textual/model.onnx" in wanted


def test_a_name_of_nothing_says_where_it_was_looked_for(repositories: Hub, tmp_path: Path) -> None:
    message = run(zoo.checkpoint, "nobody/nothing", tmp_path, repositories.url)
    for part in ("no model is named 'nobody/nothing'", "no repository of the hub", "404"):
        assert part in message.stdout
