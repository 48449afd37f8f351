"""The workload: a model with seeded random weights, photos, embeddings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save_file

from clip_server.models import weights, zoo
from clip_server.towers import registry

CACHE = Path(".cache/bench").resolve()
MODEL = "ViT-B-32::openai"
# One attention head.
THIN_WIDTH = 64
# More than are ever under way at once, so that no server can share the work on two.
PHOTOS = 96
PHOTO_SIZE = (1600, 1200)
PHOTO_QUALITY = 90
# Of a collection: the dimensions of an embedding, the clusters they are in, how far they are from
# the centre of theirs, and the queries.
DIMENSIONS, CLUSTERS, SPREAD, QUERIES = 512, 1000, 0.7, 500
# Photographs that come with scikit-image.
_SOURCES = ("astronaut", "coffee", "chelsea", "rocket")


def checkpoint() -> Path:
    """The folder of an open_clip checkpoint of MODEL's architecture, made once."""
    return _checkpoint("open_clip", zoo.resolve(MODEL).config)


def thin_checkpoint() -> Path:
    """The same with one layer of the least width: what it computes takes hardly any time."""
    config = dict(zoo.resolve(MODEL).config)
    config["embed_dim"] = THIN_WIDTH
    for tower in ("text_cfg", "vision_cfg"):
        config[tower] = {**config[tower], "width": THIN_WIDTH, "layers": 1}
    config["text_cfg"]["heads"] = 1
    return _checkpoint("open_clip thin", config)


def _checkpoint(name: str, config: dict[str, Any]) -> Path:
    folder = CACHE / "models" / name
    if not (folder / weights.CHECKPOINT).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        described = {"model_cfg": config, "preprocess_cfg": {}}
        (folder / weights.CONFIG).write_text(json.dumps(described))
        shapes = registry.tensor_shapes(config)
        save_file(_random_tensors(shapes), folder / weights.CHECKPOINT)
    return folder


def _random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, NDArray[np.float32]]:
    """Weights of the size that training starts from: speed does not depend on their values."""
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(1.0 if _is_gain(name) else 0.0, 0.02, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    tensors["logit_scale"] = np.array(np.log(100), np.float32)
    return tensors


def _is_gain(name: str) -> bool:
    """Whether a tensor is the gain of a layer norm."""
    return ".ln_" in f".{name}" and name.endswith("weight")


def photos() -> Path:
    """A folder of PHOTOS distinct JPEG photographs, made once."""
    folder = CACHE / "photos"
    if len(list(folder.glob("*.jpg"))) < PHOTOS:
        folder.mkdir(parents=True, exist_ok=True)
        for number, picture in zip(range(PHOTOS), pictures(PHOTO_SIZE), strict=False):
            picture.save(folder / f"{number:02}.jpg", quality=PHOTO_QUALITY)
    return folder


def pictures(size: tuple[int, int], seed: int = 0) -> Iterator[Image.Image]:
    """Distinct pictures without end: parts of photographs, mirrored, recoloured, and with the
    grain of a camera's sensor, which enlarging took away."""
    from skimage import data

    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in _SOURCES]
    while True:
        for source in sources:
            part = source.resize(size, Image.Resampling.BICUBIC, _random_part(source.size, rng))
            pixels = np.asarray(part, np.float32)[:, :: rng.choice([-1, 1])]
            gains = rng.uniform(0.8, 1.2, 3)
            grain = rng.normal(0, rng.uniform(2, 6), pixels.shape)
            yield Image.fromarray((pixels * gains + grain).clip(0, 255).astype(np.uint8))


def _random_part(size: tuple[int, int], rng: np.random.Generator) -> tuple[float, ...]:
    """A box of half to nine tenths of a picture's sides."""
    share = rng.uniform(0.5, 0.9)
    wide, high = size[0] * share, size[1] * share
    left, top = rng.uniform(0, size[0] - wide), rng.uniform(0, size[1] - high)
    return left, top, left + wide, top + high


def jpeg(picture: Image.Image, quality: int, subsampling: str) -> bytes:
    """A picture as a JPEG file; subsampling as Pillow names it, e.g. `4:2:0`."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def embeddings(count: int) -> Path:
    """A folder with `rows.npy`, [count, D], and `queries.npy`, [QUERIES, D], made once.

    They are float32 of length 1, in clusters; the queries are none of the rows.
    """
    folder = CACHE / "embeddings" / str(count)
    if not (folder / "queries.npy").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        centres = _unit(rng.standard_normal((CLUSTERS, DIMENSIONS), np.float32))
        for name, number in (("rows", count), ("queries", QUERIES)):
            noise = _unit(rng.standard_normal((number, DIMENSIONS), np.float32))
            near = centres[rng.integers(CLUSTERS, size=number)]
            np.save(folder / f"{name}.npy", _unit(near + SPREAD * noise))
    return folder


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit
