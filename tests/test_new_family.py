"""The recipe of CONTRIBUTING.md holds: a new family is its file, and its line in the registry."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from cn_clip_reference import drawn
from conftest import ROOT, Start, copy_package, flow, needs_torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from toy_family import COLOUR, PROJECTION, TABLE, BagOfWords, MeanColour

from clip_client import Client
from clip_server.model_card import TextSpec
from clip_server.models import weights, zoo
from clip_server.preprocess.tokenizer import tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime
from clip_server.towers import registry

TEXT = {"context_length": 20, "vocab_size": 8192, "bag_of_words": 48}
CONFIG = seeded.SMALL_VIT | {"text_cfg": TEXT}
TEXTS = ["a cat", "two dogs and a bird on the roof", "snow"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a seeded model with this text tower."""
    folder, dim = tmp_path_factory.mktemp("toy"), CONFIG["embed_dim"]
    image = registry.image_tower(CONFIG).shapes(dim)
    text = BagOfWords(TEXT["bag_of_words"], TEXT["vocab_size"], TEXT["context_length"]).shapes(dim)
    save_file(drawn({"logit_scale": (), **image, **text}), folder / weights.CHECKPOINT)
    seeded.describe(folder, CONFIG)
    return folder


def expected(checkpoint: Path) -> tuple[list[NDArray[np.int32]], NDArray[np.float32]]:
    """The tokens of the texts, and the family's own arithmetic in numpy."""
    tensors = load_file(checkpoint / weights.CHECKPOINT)
    tokenizer = tokenizer_for(TextSpec(context_length=20, vocab_size=TEXT["vocab_size"]))
    rows = [tokenizer.encode(text) for text in TEXTS]
    means = np.stack([tensors[TABLE][row].mean(axis=0) for row in rows])
    return rows, means @ tensors[PROJECTION]


@pytest.mark.slow
def test_a_server_of_a_new_family(checkpoint: Path, start: Start, tmp_path: Path) -> None:
    """In a copy of the package that has the file and the line, and no other change."""
    package = copy_package(tmp_path)
    shutil.copy(ROOT / "tests" / "toy_family.py", package / "towers" / "bag_of_words.py")
    file = package / "towers" / "registry.py"
    file.write_text(with_line(file.read_text("utf-8")), "utf-8")
    served = flow("onnx", name="mine", model_path=str(checkpoint))
    client = Client(start(served, PYTHONPATH=str(tmp_path)).grpc)
    assert seeded.relative(client.encode(TEXTS), expected(checkpoint)[1]) < 1e-5


def with_line(registry_file: str) -> str:
    """The registry with one family more."""
    imported = "from clip_server.towers.bert import BertText\n"
    listed = "    BertText,\n"
    assert imported in registry_file
    assert listed in registry_file
    mine = "from clip_server.towers.bag_of_words import BagOfWords\n"
    text = registry_file.replace(imported, mine + imported)
    return text.replace(listed, f"{listed}    BagOfWords,\n")


@needs_torch
def test_every_runtime_and_precision(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_server.runtimes.torch import TorchRuntime

    monkeypatch.setattr(registry, "TEXT_FAMILIES", (*registry.TEXT_FAMILIES, BagOfWords))
    card = zoo.resolve("mine", checkpoint)
    assert (card.text.trim, card.text.pad_id, card.text.context_length) == ("masked", 0, 20)
    rows, vectors = expected(checkpoint)
    tokens = np.zeros((len(rows), 20), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    runtimes: list[tuple[Any, dict[str, Any], float]] = [
        (OnnxRuntime, {}, 1e-5),
        (OnnxRuntime, {"precision": "int8"}, 0.05),
        (TorchRuntime, {}, 1e-5),
    ]
    longest = max(map(len, rows))
    for runtime, options, tolerance in runtimes:
        loaded = runtime.load("mine", model_path=checkpoint, device="cpu", **options)
        for length in (longest, 20):
            found = loaded.encode_text(tokens[:, :length])
            assert seeded.relative(found, vectors) < tolerance


def test_a_new_family_of_image_towers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "IMAGE_FAMILIES", (*registry.IMAGE_FAMILIES, MeanColour))
    config = seeded.SMALL_VIT | {"vision_cfg": {"mean_colour": True, "image_size": 64}}
    tensors = drawn(registry.tensor_shapes(config))
    save_file(tensors, tmp_path / weights.CHECKPOINT)
    seeded.describe(tmp_path, config)
    runtime = OnnxRuntime.load("mine", model_path=tmp_path, device="cpu")
    pixels, image = seeded.random_pixels(config, 3), runtime.card.image
    colours = (pixels.mean(axis=(2, 3)) / 255 - image.mean) / image.std
    assert seeded.relative(runtime.encode_image(pixels), colours @ tensors[COLOUR]) < 1e-4
