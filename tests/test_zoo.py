"""Names to cards."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from clip_server.errors import ConfigurationError, UnknownModelError, WeightsError
from clip_server.model_card import ImageSpec
from clip_server.models import weights, zoo
from clip_server.towers import registry

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
        ("RN50", "RN50::openai", 1024, 224),
        ("RN101", "RN101::openai", 512, 224),
        ("RN50x4", "RN50x4::openai", 640, 288),
        ("RN50x16", "RN50x16::openai", 768, 384),
        ("RN50x64", "RN50x64::openai", 1024, 448),
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


def test_every_checkpoint_of_open_clips_has_a_card() -> None:
    open_clip = pytest.importorskip("open_clip")
    known = [(name, tag) for name, tag in open_clip.list_pretrained()]
    assert len(known) > 150
    for architecture, tag in known:
        card = zoo.resolve(f"{architecture}::{tag}")
        expected = open_clip.get_pretrained_cfg(architecture, tag)
        assert card.name.endswith(f"::{tag}")
        hub = "/".join(filter(None, (card.hub, card.hub_file)))
        assert hub == expected["hf_hub"].rstrip("/")
        assert (card.image.mean, card.image.std) == (expected["mean"], expected["std"])
        assert card.image.interpolation == expected["interpolation"]
        assert card.image.resize == expected["resize_mode"]
        model = open_clip.get_model_config(architecture)
        quick = model.get("quick_gelu", False) or expected.get("quick_gelu", False)
        assert card.config == model | {"quick_gelu": quick}
        assert card.dim == model["embed_dim"]
        assert card.image.size == model["vision_cfg"]["image_size"]
        assert card.text.context_length == model["text_cfg"].get("context_length", 77)


def test_every_name_is_of_a_card() -> None:
    for name in zoo.names():
        card = zoo.resolve(name)
        assert card.name == name
        assert all(zoo.resolve(alias) is card for alias in zoo.other_names(name))


def test_the_table_is_what_its_script_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m tools.cards` after a new release of open_clip."""
    pytest.importorskip("open_clip")
    monkeypatch.syspath_prepend(ROOT)
    cards = importlib.import_module("tools.cards")
    cards.write(tmp_path / "zoo.json")
    assert (tmp_path / "zoo.json").read_text("utf-8") == cards.TABLE.read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "trim", "pad_id", "clean"),
    [
        ("ViT-B-32::openai", "causal", 0, "lower"),
        ("ViT-B-16-SigLIP::webli", "fixed", 1, "canonicalize"),
        ("ViT-B-16-SigLIP2::webli", "fixed", 0, "canonicalize"),
        ("ViT-L-14-CLIPA::datacomp1b", "fixed", 0, "whitespace"),
        ("xlm-roberta-base-ViT-B-32::laion5b_s13b_b90k", "masked", 1, "whitespace"),
        ("coca_ViT-B-32::laion2b_s13b_b90k", "fixed", 0, "lower"),
        ("MobileCLIP-S1::datacompdr", "fixed", 0, "lower"),
        ("PE-Core-B-16::meta", "causal", 0, "lower"),
    ],
)
def test_how_texts_become_tokens(name: str, trim: str, pad_id: int, clean: str) -> None:
    text = zoo.resolve(name).text
    assert (text.trim, text.pad_id, text.clean) == (trim, pad_id, clean)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownModelError) as caught:
        zoo.resolve("vit-b/33")
    assert "did you mean ViT-B/32" in str(caught.value)
    assert "python -m clip_server.models" in str(caught.value)


def test_an_architecture_without_openais_weights_is_answered_with_its_tags() -> None:
    with pytest.raises(UnknownModelError, match="did you mean EVA02-B-16::merged2b_s8b_b131k"):
        zoo.resolve("EVA02-B-16")


def test_a_name_like_no_other_is_still_answered_with_where_they_are_listed() -> None:
    with pytest.raises(UnknownModelError, match=r"no model is named 'xyzzy': `python -m"):
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


@pytest.mark.parametrize(
    ("architecture", "name", "quick_gelu"),
    [
        ("EVA02-B-16", "EVA02-B-16::epoch_3", False),
        ("ViT-B-32", "ViT-B-32::epoch_3", False),
        ("ViT-B-32-quickgelu", "ViT-B-32-quickgelu::epoch_3", True),
        ("ViT-B/32", "ViT-B-32::openai", True),
    ],
)
def test_an_architecture_may_stand_before_the_path(
    architecture: str, name: str, quick_gelu: bool, tmp_path: Path
) -> None:
    file = tmp_path / "epoch_3.safetensors"
    save_file({"logit_scale": np.zeros((), np.float32)}, file)
    card = zoo.resolve(f"{architecture}::{file}")
    assert (card.name, card.dim, card.config["quick_gelu"]) == (name, 512, quick_gelu)
    assert zoo.checkpoint(f"{architecture}::{file}") == file
    with pytest.raises(WeightsError, match="no checkpoint at"):
        zoo.checkpoint(f"{architecture}::{tmp_path / 'missing.pt'}")
    with pytest.raises(UnknownModelError, match="no model is named 'ViT-B-23'"):
        zoo.resolve(f"ViT-B-23::{file}")


def test_a_path_may_begin_at_home_or_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuned").mkdir()
    file = tmp_path / "tuned" / "model.safetensors"
    save_file({"logit_scale": np.zeros((), np.float32)}, file)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/tuned/model.safetensors", "~/tuned", "tuned/model.safetensors", "./tuned"):
        assert zoo.checkpoint("ViT-B/32", path).samefile(file)
        assert zoo.checkpoint(f"ViT-B/32::{path}").samefile(file)


@pytest.mark.parametrize("name", ["ViT-B/32::/nowhere/tuned", "ViT-B-32::tuned/new", "~/tuned"])
def test_a_path_to_nothing_is_no_unknown_name(name: str) -> None:
    with pytest.raises(WeightsError, match=r"no checkpoint at .*tuned.*: that does not exist"):
        zoo.checkpoint(name)


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-L-14-336", "RN50x4", "RN101"])
def test_shapes_tell_the_architecture(architecture: str, tmp_path: Path) -> None:
    """Of tensors, only the shapes are looked at: these are as long as they must be, and empty."""
    torch = pytest.importorskip("torch")
    shapes = registry.tensor_shapes(zoo.resolve(f"{architecture}::openai").config)
    number = torch.zeros(())
    file = tmp_path / "epoch_3.pt"
    torch.save({name: number.expand(shape) for name, shape in shapes.items()}, file)
    card = zoo.resolve(str(file))
    assert card.name == f"{architecture}::epoch_3"
    assert card.config == zoo.resolve(f"{architecture}::openai").config | {"quick_gelu": False}


def test_shapes_that_tell_nothing_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "epoch_3.safetensors"
    save_file({"logit_scale": np.zeros((), np.float32)}, file)
    with pytest.raises(ConfigurationError) as caught:
        zoo.resolve(str(file))
    assert "no architecture has its tensors" in str(caught.value)
    assert f"give its name as architecture::{file}" in str(caught.value)


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
