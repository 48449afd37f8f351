"""`dtype: int8`: nearly the vectors of float32, whatever the processor and the neighbours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from cn_clip_reference import drawn
from numpy.typing import NDArray
from safetensors.numpy import save_file

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec
from clip_server.models import converted, zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import graph, quantize, registry

SMALL = {
    "vision transformer": seeded.SMALL_VIT,
    "exact GELU": seeded.SMALL_GELU,
    "residual network": seeded.SMALL_RESNET,
}
SAMPLES = sorted((zoo.EMBEDDED_PATH / "samples").glob("*.png"))


def load_both(name: str, folder: Path | None = None) -> tuple[OnnxRuntime, OnnxRuntime]:
    """In float32 and in int8."""
    exact, rounded = (
        OnnxRuntime.load(name, model_path=folder, device="cpu", precision=dtype, threads=1)
        for dtype in ("fp32", "int8")
    )
    return exact, rounded


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of each row of one with the same row of the other."""
    a, b = unit(a), unit(b)
    return (a * b).sum(axis=1)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)


def assert_near(exact: OnnxRuntime, rounded: OnnxRuntime, least: float) -> None:
    """Every item's cosine between the two is `least` or more, and they are not the same."""
    config = exact.card.config
    pixels = seeded.random_pixels(config, 4)
    tokens = seeded.random_tokens(config, 8, longest=12)
    for found, expected in (
        (rounded.encode_image(pixels), exact.encode_image(pixels)),
        (rounded.encode_text(tokens), exact.encode_text(tokens)),
    ):
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert cosines(found, expected).min() >= least
        assert seeded.relative(found, expected) > 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_is_near_float32(name: str, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    model = seeded.open_clip_model(SMALL[name])
    assert_near(*load_both("small", seeded.save(model, tmp_path, SMALL[name])), least=0.998)


@pytest.mark.slow
def test_openais_model_is_near_float32(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    config = zoo.resolve("ViT-B-32::openai").config
    folder = seeded.save(seeded.open_clip_model(config), tmp_path, config)
    assert_near(*load_both("ViT-B-32::openai", folder), least=0.997)


def test_images_of_low_contrast_are_near_float32(tmp_path: Path) -> None:
    """The brightness of pixels does not multiply the rounding errors of weights."""
    tensors = drawn(registry.tensor_shapes(seeded.SMALL_VIT))
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    seeded.describe(tmp_path, seeded.SMALL_VIT)
    exact, rounded = load_both("small", tmp_path)
    pixels = np.random.default_rng(0).integers(110, 146, (4, 3, 64, 64), dtype=np.uint8)
    found, expected = rounded.encode_image(pixels), exact.encode_image(pixels)
    assert cosines(found, expected).min() >= 0.9995


def test_the_embedded_model_finds_the_same() -> None:
    exact, rounded = load_both("embedded")
    card = exact.card
    transform, tokenizer = ImageTransform(card.image), tokenizer_for(card.text)
    pixels = np.stack([transform(path.read_bytes()) for path in SAMPLES])
    tokens = pad([tokenizer.encode(f"a {path.stem}") for path in SAMPLES], card.text)
    images, texts = rounded.encode_image(pixels), rounded.encode_text(tokens)
    assert cosines(images, exact.encode_image(pixels)).min() >= 0.998
    assert cosines(texts, exact.encode_text(tokens)).min() >= 0.998
    scores = unit(images) @ unit(texts).T
    assert scores.argmax(axis=0).tolist() == scores.argmax(axis=1).tolist() == [*range(8)]


def test_a_vector_does_not_depend_on_the_rest_of_its_batch() -> None:
    rounded = load_both("embedded")[1]
    pixels = seeded.random_pixels(rounded.card.config, 6)
    pixels[0], pixels[1] = 0, 255
    tokens = seeded.random_tokens(rounded.card.config, 6, longest=9)[:, :9]
    for encode, batch in ((rounded.encode_image, pixels), (rounded.encode_text, tokens)):
        together: NDArray[np.float32] = encode(batch)  # type: ignore[operator]
        for index, expected in enumerate(together):
            alone = encode(batch[index : index + 1])  # type: ignore[operator]
            assert seeded.relative(alone[0], expected) < 1e-4


def test_what_it_says_of_itself() -> None:
    rounded = OnnxRuntime.load("embedded", precision="int8")
    assert (rounded.name, rounded.device, rounded.precision) == ("onnx", "cpu", "int8")


def test_it_is_for_the_cpu_and_for_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="'int8' runs on the CPU, not on device 'cuda'"):
        OnnxRuntime.load("embedded", precision="int8", device="cuda")
    converted.write(tmp_path, zoo.resolve("embedded"), "fp32")
    for name in ("visual.onnx", "textual.onnx"):
        (tmp_path / name).write_bytes(b"a graph of one's own")
    with pytest.raises(ConfigurationError, match="'int8' is for checkpoints"):
        OnnxRuntime.load("ViT-B/32", precision="int8", model_path=tmp_path)


def test_graphs_are_less_than_half_the_size() -> None:
    tensors = tensors_of(seeded.SMALL_VIT, lambda shape: np.ones(shape))
    for build in (
        partial(graph.build_visual, seeded.SMALL_VIT, tensors, ImageSpec(64)),
        partial(graph.build_textual, seeded.SMALL_VIT, tensors),
    ):
        assert build(precision="int8").ByteSize() < build().ByteSize() / 2


def tensors_of(config: dict[str, Any], fill: Any) -> dict[str, NDArray[np.float32]]:
    shapes = registry.tensor_shapes(config)
    return {name: fill(shape).astype(np.float32) for name, shape in shapes.items()}


def test_weights_of_zeros_give_zeros(tmp_path: Path) -> None:
    save_file(tensors_of(seeded.SMALL_VIT, np.zeros), tmp_path / "open_clip_model.safetensors")
    seeded.describe(tmp_path, seeded.SMALL_VIT)
    for runtime in load_both("small", tmp_path):
        assert not runtime.encode_image(seeded.random_pixels(seeded.SMALL_VIT, 2)).any()
        assert not runtime.encode_text(seeded.random_tokens(seeded.SMALL_VIT, 2, 5)).any()


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["normal", "equal", "one outlier", "zero"])
def test_products_of_neighbouring_weights_fit_into_sixteen_bits(rows: int, kind: str) -> None:
    matrix = np.random.default_rng(rows).normal(size=(rows, 50)).astype(np.float32)
    matrix = {
        "normal": matrix,
        "equal": np.full_like(matrix, -0.3),
        "one outlier": np.where(np.arange(50) == np.arange(rows)[:, None], 1e3, matrix),
        "zero": np.zeros_like(matrix),
    }[kind]
    integers, scale = quantize.quantized(matrix)
    assert (integers.dtype, integers.shape, scale.shape) == (np.int8, matrix.shape, (50,))
    assert np.abs(integers * scale - matrix).max() <= scale.max() * 0.51
    pairs = np.zeros((rows + rows % 2, 50), dtype=np.int64)
    pairs[:rows] = integers
    pairs = pairs.reshape(-1, 2, 50)
    for of_one_sign in (pairs.clip(min=0), pairs.clip(max=0)):
        assert 255 * np.abs(of_one_sign.sum(axis=1)).max() < 2**15


def test_most_of_eight_bits_is_used() -> None:
    matrix = np.random.default_rng(0).normal(size=(512, 64)).astype(np.float32)
    integers, _ = quantize.quantized(matrix)
    assert np.median(np.abs(integers).max(axis=0)) > 80  # seven bits would give 64
