"""Chinese-CLIP: cn_clip's own tokens, pixels, vectors and probabilities, in every runtime."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import cn_clip_reference as reference
import numpy as np
import pytest
import seeded
from conftest import Start, flow
from numpy.typing import NDArray
from safetensors.numpy import save_file

from clip_client import Client
from clip_client.scores import normalize
from clip_server.errors import ConfigurationError, WeightsError
from clip_server.model_card import Precision, TextSpec
from clip_server.models import weights, zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime, open_tower
from clip_server.runtimes.protocol import Runtime
from clip_server.towers import graph, onnx_file, registry

KINDS = ["onnx", "torch"]
NAMES = [f"CN-CLIP/{size}" for size in reference.REAL]
SPEC = TextSpec(context_length=52, trim="masked", vocabulary="chinese-bert")


@pytest.fixture(scope="module")
def theirs() -> dict[str, NDArray[Any]]:
    """What cn_clip itself made; `cn_clip_reference` says how."""
    with np.load(reference.FILE) as kept:
        return dict(kept)


def load(kind: str, *arguments: Any, **options: Any) -> Runtime:
    if kind == "onnx":
        return OnnxRuntime.load(*arguments, **options)
    pytest.importorskip("open_clip")
    from clip_server.runtimes.torch import TorchRuntime

    return TorchRuntime.load(*arguments, **options)


def saved(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with the seeded checkpoint of a configuration."""
    tensors = reference.drawn(registry.tensor_shapes(config))
    save_file(tensors, folder / weights.CHECKPOINT)
    seeded.describe(folder, config)
    return folder


def measured(runtime: Runtime) -> dict[str, NDArray[np.float32]]:
    """Vectors and probabilities of the pictures and classes, from their bytes and characters."""
    transform = ImageTransform(runtime.card.image, exact=True)
    pixels = np.stack([transform(png(image)) for image in reference.PICTURES])
    tokenizer = tokenizer_for(runtime.card.text)
    tokens = pad([tokenizer.encode(text) for text in reference.CLASSES], runtime.card.text)
    images, texts = runtime.encode_image(pixels), runtime.encode_text(tokens)
    logits = runtime.card.logit_scale * normalize(images) @ normalize(texts).T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    return {
        "images": images,
        "texts": texts,
        "probabilities": shares / shares.sum(axis=1, keepdims=True),
    }


def png(image: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def assert_equal_to_cn_clip(runtime: Runtime, theirs: dict[str, Any], name: str) -> None:
    found = measured(runtime)
    for kind in ("images", "texts"):
        assert seeded.relative(found[kind], theirs[f"{name}.{kind}"]) < 1e-4
    np.testing.assert_allclose(found["probabilities"], theirs[f"{name}.probabilities"], atol=1e-3)


def test_tokens_are_cn_clips(theirs: dict[str, Any]) -> None:
    tokenizer, texts = tokenizer_for(SPEC), theirs["texts"].tolist()
    # numpy drops the zeros at the end of a string, and they are no tokens.
    assert [text.rstrip("\0") for text in reference.texts()] == texts
    rows = [tokenizer.encode(text) for text in texts]
    found = np.zeros_like(theirs["tokens"])
    for target, row in zip(found, rows, strict=True):
        target[: len(row)] = row
    for text, row, expected in zip(texts, found, theirs["tokens"], strict=True):
        np.testing.assert_array_equal(row, expected, err_msg=repr(text))
    assert max(map(len, rows)) == 52


def test_pixels_are_cn_clips(theirs: dict[str, Any]) -> None:
    image = zoo.card_from_config("small", reference.SMALL, {}).image
    found = [ImageTransform(image, exact=True)(png(each)) for each in reference.PICTURES]
    np.testing.assert_array_equal(np.stack(found), theirs["pixels"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_equals_cn_clip(name: str, kind: str, theirs: dict[str, Any], tmp_path: Path) -> None:
    runtime = load(kind, "mine", model_path=saved(tmp_path, reference.CONFIGS[name]))
    assert_equal_to_cn_clip(runtime, theirs, name)


def test_equals_cn_clip_when_traced(theirs: dict[str, Any], tmp_path: Path) -> None:
    runtime = load("torch", "mine", model_path=saved(tmp_path, reference.SMALL), jit=True)
    assert_equal_to_cn_clip(runtime, theirs, "small")


@pytest.mark.parametrize(
    ("precision", "least"), [("fp32", 0.99999), ("fp16", 0.9999), ("int8", 0.99)]
)
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_every_precision(
    name: str, precision: Precision, least: float, theirs: dict[str, Any], tmp_path: Path
) -> None:
    config = reference.CONFIGS[name]
    tensors = reference.drawn(registry.tensor_shapes(config))
    image = zoo.card_from_config(name, config, {}).image
    batches = {"images": theirs["pixels"], "texts": theirs["tokens"][: len(reference.CLASSES)]}
    models = {
        "images": graph.build_visual(config, tensors, image, precision=precision),
        "texts": graph.build_textual(config, tensors, precision=precision),
    }
    for kind, model in models.items():
        onnx_file.save(model, tmp_path / "tower.onnx")
        found = normalize(open_tower(tmp_path / "tower.onnx")(batches[kind]))
        cosines = (found * normalize(theirs[f"{name}.{kind}"])).sum(axis=1)
        assert cosines.min() > least


@pytest.mark.slow
def test_a_server_ranks_as_cn_clip_does(
    theirs: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    folder = saved(tmp_path, reference.SMALL)
    server = start(flow("onnx", name="mine", model_path=str(folder), exact=True))
    client = Client(server.grpc)
    for image, expected in zip(reference.PICTURES, theirs["small.probabilities"], strict=True):
        ranked = client.rank(png(image), reference.CLASSES)
        found = {match.item: match.probability for match in ranked}
        np.testing.assert_allclose([found[text] for text in reference.CLASSES], expected, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.MEASURED)
def test_real_sizes_equal_cn_clip(name: str, theirs: dict[str, Any], tmp_path: Path) -> None:
    canonical = f"CN-CLIP/{name}"
    file = tmp_path / f"{name}.safetensors"
    save_file(reference.drawn(registry.tensor_shapes(zoo.resolve(canonical).config)), file)
    for kind in KINDS:
        runtime = load(kind, canonical, model_path=file)
        assert runtime.card.name == canonical
        assert_equal_to_cn_clip(runtime, theirs, name)
        del runtime


@pytest.mark.parametrize("size", reference.REAL)
def test_cards_have_cn_clips_tensors(size: str, theirs: dict[str, Any]) -> None:
    card = zoo.resolve(f"CN-CLIP/{size}")
    assert reference.digest(registry.tensor_shapes(card.config)) == theirs[f"{size}.shapes"]
    assert (card.text.context_length, card.text.trim) == (52, "masked")
    assert (card.text.vocabulary, card.text.pad_id) == ("chinese-bert", 0)
    assert card.image.resize == "squash"
    assert card.hub is not None
    assert zoo.resolve(card.hub) == card


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("RN50@RBT3-chinese", "CN-CLIP/RN50"),
        ("ViT-L-14-336@RoBERTa-wwm-ext-base-chinese", "CN-CLIP/ViT-L-14-336"),
        ("ViT-H-14@RoBERTa-wwm-ext-large-chinese", "CN-CLIP/ViT-H-14"),
    ],
)
def test_cn_clips_names_of_architectures(name: str, canonical: str) -> None:
    assert zoo.resolve(name).name == canonical


@pytest.mark.parametrize("kind", KINDS)
def test_trimming_the_padding_changes_nothing(kind: str, tmp_path: Path) -> None:
    runtime = load(kind, "mine", model_path=saved(tmp_path, reference.SMALL))
    tokens = np.zeros((3, 52), np.int32)
    for row, length in zip(tokens, (3, 9, 5), strict=True):
        row[:length] = np.arange(101, 101 + length)
    whole = runtime.encode_text(tokens)
    for length in (9, 10, 51):
        assert seeded.relative(runtime.encode_text(tokens[:, :length]), whole) < 1e-5
    # Nor does a longer neighbour.
    assert seeded.relative(runtime.encode_text(tokens[:1, :3]), whole[:1]) < 1e-5


def test_a_trainers_checkpoint_is_read(theirs: dict[str, Any], tmp_path: Path) -> None:
    """As cn_clip's trainer saves it: in half precision, named as several GPUs had it, and with
    BERT's own pooling, which no text tower uses."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("open_clip")
    tensors = reference.drawn(registry.tensor_shapes(reference.SMALL))
    tensors["bert.pooler.dense.bias"] = np.zeros(64, np.float32)
    halves = {f"module.{name}": torch.from_numpy(each).half() for name, each in tensors.items()}
    torch.save({"epoch": 3, "state_dict": halves}, tmp_path / "epoch3.pt")
    seeded.describe(tmp_path, reference.SMALL)
    for kind in KINDS:
        found = measured(load(kind, "mine", model_path=tmp_path / "epoch3.pt"))
        np.testing.assert_allclose(
            normalize(found["texts"]), normalize(theirs["small.texts"]), atol=5e-3
        )


def test_the_architecture_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    shapes = registry.tensor_shapes(zoo.resolve("CN-CLIP/RN50").config)
    # BERT's own pooling, which no text tower uses, and what only training needs.
    unused = {"bert.pooler.dense.bias": (768,), "visual.bn1.num_batches_tracked": ()}
    file = tmp_path / "epoch_latest.safetensors"
    save_file(
        {name: np.zeros(shape, np.float16) for name, shape in (shapes | unused).items()}, file
    )
    for name in ("CN-CLIP/RN50", "RN50@RBT3-chinese"):
        assert zoo.resolve(f"{name}::{file}") == zoo.resolve("CN-CLIP/RN50")
    card = zoo.resolve(str(file))
    assert (card.name, card.dim, card.image.resize) == (
        "CN-CLIP/RN50::epoch_latest",
        1024,
        "squash",
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": None, "mlp_width": None}, "lacks mlp_width, width"),
        ({"heds": 4}, "unknown heds.* known are width, layers, heads"),
    ],
)
def test_keys_of_a_text_tower_are_known_or_refused(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, reference.SMALL)
    bert = reference.SMALL_BERT | changed
    bert = {key: value for key, value in bert.items() if value is not None}
    text = reference.SMALL_TEXT | {"bert": bert}
    seeded.describe(folder, reference.SMALL | {"text_cfg": text})
    with pytest.raises(ConfigurationError, match=message):
        zoo.resolve("mine", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_another_text_tower_is_refused(kind: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, reference.SMALL)
    text = reference.SMALL["text_cfg"]
    seeded.describe(
        folder, reference.SMALL | {"text_cfg": text | {"bert": text["bert"] | {"layers": 2}}}
    )
    with pytest.raises(
        WeightsError, match=r"bert\.encoder\.layer\.2\.attention.* \(not in the model\)"
    ):
        load(kind, "mine", model_path=folder)
