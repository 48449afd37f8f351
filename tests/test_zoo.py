"""Names to cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from clip_server.errors import ConfigurationError, UnknownModelError, WeightsError
from clip_server.models import weights, zoo
from clip_server.models.card import ImageSpec

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 96, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 2, "layers": 2},
}


def folder_with(path: Path, described: dict[str, Any], scale: float = 30.0) -> Path:
    save_file({"logit_scale": np.array(np.log(scale), np.float32)}, path / weights.CHECKPOINT)
    (path / weights.CONFIG).write_text(json.dumps(described))
    return path


@pytest.mark.parametrize(
    ("name", "canonical", "dim", "size"),
    [
        ("ViT-B/32", "ViT-B-32::openai", 512, 224),
        ("ViT-B-16", "ViT-B-16::openai", 512, 224),
        ("ViT-L/14", "ViT-L-14::openai", 768, 224),
        ("ViT-L/14@336px", "ViT-L-14-336::openai", 768, 336),
        ("ViT-B-32-quickgelu::openai", "ViT-B-32::openai", 512, 224),
    ],
)
def test_openais_models_under_their_names(name: str, canonical: str, dim: int, size: int) -> None:
    card = zoo.resolve(name)
    assert (card.name, card.dim, card.image) == (canonical, dim, ImageSpec(size))
    assert (card.text.context_length, card.text.vocab_size) == (77, 49408)
    assert card.config["quick_gelu"] is True
    assert card.logit_scale == 100
    assert card.licence
    assert zoo.resolve(canonical) == card


@pytest.mark.parametrize("name", [name for name in zoo.names() if name != zoo.EMBEDDED])
def test_cards_say_what_open_clip_says(name: str) -> None:
    open_clip = pytest.importorskip("open_clip")
    card = zoo.resolve(name)
    architecture, _, tag = name.partition("::")
    expected = open_clip.get_pretrained_cfg(architecture, tag)
    assert card.hub == expected["hf_hub"].rstrip("/")
    assert (card.image.mean, card.image.std) == (expected["mean"], expected["std"])
    assert card.image.interpolation == expected["interpolation"]
    assert card.image.resize == expected["resize_mode"]
    model = open_clip.get_model_config(architecture) | {"quick_gelu": expected["quick_gelu"]}
    assert card.config == model


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownModelError) as caught:
        zoo.resolve("vit-b/33")
    assert "did you mean ViT-B/32" in str(caught.value)
    assert all(name in str(caught.value) for name in zoo.names())


def test_a_name_like_no_other_is_still_answered_with_what_there_is() -> None:
    with pytest.raises(UnknownModelError, match="no model is named 'xyzzy': The names are"):
        zoo.resolve("xyzzy")


def test_the_embedded_model_comes_with_the_package() -> None:
    card = zoo.resolve("embedded")
    assert card.name == zoo.EMBEDDED == zoo.names()[0]
    assert card.text.vocab_size == 8192
    assert card.logit_scale > 1
    assert zoo.checkpoint("embedded").parent == zoo.EMBEDDED_PATH
    assert zoo.checkpoint("embedded") == zoo.checkpoint(zoo.EMBEDDED)


def test_a_folder_with_a_configuration_gives_its_own_card(tmp_path: Path) -> None:
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
    folder = folder_with(tmp_path, {"model_cfg": CONFIG, "preprocess_cfg": preprocess})
    card = zoo.resolve("mine", folder)
    assert (card.name, card.dim) == ("mine", 32)
    assert card.image == ImageSpec(96, mean=(0.5,) * 3, std=(0.5,) * 3, resize="squash")
    assert (card.text.context_length, card.text.vocab_size) == (20, 600)
    assert card.logit_scale == pytest.approx(30)
    # The file in the folder means the same.
    assert zoo.resolve("mine", folder / weights.CHECKPOINT) == card


def test_a_checkpoint_alone_has_the_card_of_its_name(tmp_path: Path) -> None:
    file = tmp_path / "finetuned.safetensors"
    save_file({"logit_scale": np.zeros((), np.float32)}, file)
    assert zoo.resolve("ViT-B/32", file) == zoo.resolve("ViT-B/32")
    assert zoo.checkpoint("ViT-B/32", file) == file
    with pytest.raises(UnknownModelError):
        zoo.resolve("mine", file)


def test_a_folder_with_nothing_in_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no checkpoint"):
        zoo.checkpoint("ViT-B/32", tmp_path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"vision_cfg": {}, "text_cfg": {}}, "no 'embed_dim'"),
        ({"embed_dim": 8, "text_cfg": {}}, "no 'vision_cfg'"),
        (CONFIG | {"vision_cfg": {"image_size": [224, 336]}}, "square"),
    ],
)
def test_a_configuration_we_cannot_follow(
    tmp_path: Path, described: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        zoo.resolve("mine", folder_with(tmp_path, {"model_cfg": described}))


def test_a_resize_we_do_not_do(tmp_path: Path) -> None:
    described = {"model_cfg": CONFIG, "preprocess_cfg": {"resize_mode": "longest"}}
    with pytest.raises(ConfigurationError, match="shortest or squash"):
        zoo.resolve("mine", folder_with(tmp_path, described))


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    (folder_with(tmp_path, {}) / weights.CONFIG).write_text("{")
    with pytest.raises(ConfigurationError, match="is not JSON"):
        zoo.resolve("mine", tmp_path)
