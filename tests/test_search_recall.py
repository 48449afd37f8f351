"""Search finds what exact cosines find: galleries with captions, over every transport."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Server
from numpy.typing import NDArray

from clip_client import Client
from clip_client.search_parameters import Target
from clip_server.evaluate.data import read_pairs
from clip_server.models import zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime

Indices = NDArray[np.int64]
Cosines = NDArray[np.float64]
EVERYTHING = {"$or": [{"x": 1}, {"x": {"$ne": 1}}]}
# The cosine of a pair depends in its last bits on the batches that the two were encoded in.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Gallery:
    """Images and captions, with their cosines as computed without a server.

    image_of: the index of each caption's image.
    twin_of: the index of the first image with the same bytes, for each image.
    """

    images: list[Path]
    captions: list[str]
    image_of: Indices
    twin_of: Indices
    # [captions, images] and [images, images].
    cosines: Cosines
    image_cosines: Cosines

    def recalls(self, image_by_caption: Indices, caption_by_image: Indices) -> tuple[float, float]:
        """R@1 of text to image and of image to text, by what was found first."""
        right_images = self.twin_of[image_by_caption] == self.twin_of[self.image_of]
        right_captions = self.twin_of[self.image_of[caption_by_image]] == self.twin_of
        return float(right_images.mean()), float(right_captions.mean())


@pytest.fixture(scope="module")
def held_out() -> Path:
    """The 1,594 emoji of the style that the built-in model was not trained on."""
    pairs = ROOT / ".cache" / "heldout" / "pairs.jsonl"
    if not pairs.exists():
        if not (find_spec("resvg_py") and find_spec("torch") and shutil.which("npm")):
            pytest.skip("rendering the held-out emoji needs npm, torch and resvg-py")
        subprocess.run([sys.executable, "-m", "training.heldout"], cwd=ROOT, check=True)
    return pairs


@pytest.fixture(
    scope="module", params=["gallery", pytest.param("held_out", marks=pytest.mark.slow)]
)
def captioned(request: pytest.FixtureRequest) -> Gallery:
    pairs = read_pairs(request.getfixturevalue(request.param))
    card = zoo.resolve("embedded")
    runtime = OnnxRuntime.load("embedded", device="cpu", threads=1)
    tokenizer, transform = tokenizer_for(card.text), ImageTransform(card.image)
    contents = [each.read_bytes() for each in pairs.images]
    texts = [runtime.encode_text(tokenizer.encode(text)[None])[0] for text in pairs.texts]
    images = [runtime.encode_image(transform(each)[None])[0] for each in contents]
    text_units, image_units = unit(texts), unit(images)
    return Gallery(
        pairs.images,
        pairs.texts,
        np.array(pairs.image_of),
        np.array([contents.index(each) for each in contents]),
        text_units @ image_units.T,
        image_units @ image_units.T,
    )


def unit(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    found = np.stack(vectors).astype(np.float64)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


@pytest.mark.parametrize("transport", ["grpc", "http", "websocket"])
def test_recall_is_that_of_exact_cosines(
    captioned: Gallery, search_server: Server, transport: str
) -> None:
    images, captions = captioned.images, captioned.captions
    with Client(getattr(search_server, transport)) as client:
        client.delete(filter=EVERYTHING)
        client.index(images, ids=[f"image {n}" for n in range(len(images))])
        client.index(captions, ids=[f"caption {n}" for n in range(len(captions))])
        assert client.count() == len(images) + len(captions)
        image_by_caption = best(client, captions, "images", captioned.cosines)
        caption_by_image = best(client, images, "texts", captioned.cosines.T)
        image_by_image = best(client, images, "images", captioned.image_cosines)
    recalls = captioned.recalls(image_by_caption, caption_by_image)
    exact = captioned.recalls(captioned.cosines.argmax(axis=1), captioned.cosines.argmax(axis=0))
    assert recalls == exact
    assert all(0.1 < recall < 1 for recall in recalls)
    np.testing.assert_array_equal(captioned.twin_of[image_by_image], captioned.twin_of)


def best(
    client: Client, queries: Sequence[Path | str], target: Target, cosines: Cosines
) -> Indices:
    """The index of each query's first match, whose score is the highest of its exact cosines."""
    matches = [found[0] for found in client.search(queries, target=target, limit=1)]
    numbers = np.array([int(match.id.split()[1]) for match in matches])
    scores = [match.score for match in matches]
    np.testing.assert_allclose(scores, cosines.max(axis=1), atol=ROUNDING)
    np.testing.assert_allclose(scores, cosines[np.arange(len(queries)), numbers], atol=ROUNDING)
    return numbers
