"""Translates the configuration of a model that transformers saved, such as a CLIPModel, a
ChineseCLIPModel or a SiglipModel, to open_clip's form. Its weights are read as any others: see
`state_dict_keys`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from clip_server.errors import ConfigurationError
from clip_server.model_card import TextSpec, Vocabulary
from clip_server.preprocess import tokenizer, wordpiece
from clip_server.towers import registry
from clip_server.towers.tower import ImageTower, TextSavedByTransformers, TextTower, Tower

Family = TypeVar("Family", bound=Tower)

CONFIG = "config.json"
# The settings for images: in a file of their own, or in that of the whole processor.
_PREPROCESSING, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
# The files of a tokenizer that has no `tokenizer.json`.
_MERGES, _WORD_PIECES = "merges.txt", "vocab.txt"
# The files that a model may lack, apart from its `tokenizer.json`.
OPTIONAL_FILES = (_PREPROCESSING, _PROCESSOR, _MERGES, _WORD_PIECES)
# M-CLIP's `config.json` does not describe its towers; its name does.
_TEXT_ALONE = "M-CLIP"
# Why a type of model is refused.
_REFUSED = {
    "siglip2": (
        "its images keep their proportions (NaFlex), which needs towers for images of any size, "
        "and these are not supported. SigLIP 2 models of a fixed size, such as "
        "google/siglip2-base-patch16-224, have the model_type 'siglip' and are supported"
    ),
    "jina_clip": (
        "its text tower is not supported: a BERT with ALiBi in jina-clip-v1, one with rotary "
        "positions and adapters in v2. The ONNX runtime serves graphs of these models, in "
        "onnx/vision_model.onnx and onnx/text_model.onnx"
    ),
    "nomic_bert": (
        "it is one tower alone: nomic-embed-vision and nomic-embed-text have a repository each, "
        "and their rotary positions and gated MLPs are not supported"
    ),
}
# Pillow's numbers of the filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}


def configuration(folder: Path) -> dict[str, Any] | None:
    """Reads the `config.json` of a folder: `model_cfg` and `preprocess_cfg`, in the form of an
    `open_clip_config.json`; None if there is no such file, or it is M-CLIP's.

    Raises:
        ConfigurationError: it is of another kind of model, or has an unsupported setting.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    config = read(file)
    kind = config.get("model_type")
    if kind == _TEXT_ALONE:
        return None
    image, text = _families(kind, file)
    try:
        towers = _towers(config, image, text)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from error
    described, saved = towers["text_cfg"], text.saved or TextSavedByTransformers()
    described |= tokenizer_keys(folder, saved.vocabulary, described["vocab_size"])
    size = towers["vision_cfg"]["image_size"]
    return {
        "model_cfg": {"embed_dim": config.get("projection_dim", 512), **towers},
        "preprocess_cfg": preprocessing(folder, size, squash=saved.resize == "squash"),
    }


def _families(kind: Any, file: Path) -> tuple[type[ImageTower], type[TextTower]]:
    """The families of the two towers of a model type.

    Raises:
        ConfigurationError: there is no family for one of them.
    """
    image = _by_type(registry.IMAGE_FAMILIES).get(kind)
    text = _by_type(registry.TEXT_FAMILIES).get(kind)
    if image is None or text is None:
        known = ", ".join(map(repr, _by_type(registry.TEXT_FAMILIES)))
        reason = _REFUSED.get(kind, f"supported are {known}")
        raise ConfigurationError(f"{file} has the model_type {kind!r}: {reason}")
    return image, text


def _by_type(families: Iterable[type[Family]]) -> dict[str, type[Family]]:
    return {kind: each for each in families if each.saved for kind in each.saved.model_types}


def _towers(
    config: Mapping[str, Any], image: type[ImageTower], text: type[TextTower]
) -> dict[str, Any]:
    """Both towers in open_clip's form: `vision_cfg`, `text_cfg` and `quick_gelu`."""
    visual = image.from_transformers(_tower(config, "vision", image))
    textual = text.from_transformers(_tower(config, "text", text))
    if textual.get("quick_gelu", visual.get("quick_gelu")) != visual.get("quick_gelu"):
        raise ConfigurationError("the towers have different activations")
    return textual | visual


def _tower(config: Mapping[str, Any], part: str, family: type[Tower]) -> dict[str, Any]:
    """A tower's configuration, with defaults; in older files the second key overrides the first."""
    settings = {**(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})}
    defaults = family.saved.defaults if family.saved else {}
    return {**defaults, **{key: value for key, value in settings.items() if value is not None}}


def read(file: Path) -> dict[str, Any]:
    """Reads a JSON file.

    Raises:
        ConfigurationError: it is not JSON.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: {error}") from error
    return found


def tokenizer_keys(folder: Path, vocabulary: Vocabulary | None, size: int) -> dict[str, Any]:
    """The keys of `text_cfg` that choose a tokenizer: a bundled one if the folder's is the same.

    vocabulary: the bundled one of the model's family, if any; size: entries that the model knows.
    """
    if vocabulary is None or not _BUNDLED[vocabulary](folder, size):
        return {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "none"}}
    return {} if vocabulary == TextSpec.vocabulary else {"vocabulary": vocabulary}


def _has_clips_merges(folder: Path, size: int) -> bool:
    """Whether a folder's tokenizer is CLIP's own, which is the default if it has none."""
    if (file := folder / tokenizer.FILE).is_file():
        merges = read(file).get("model", {}).get("merges", [])
    elif (file := folder / _MERGES).is_file():
        merges = [line for line in file.read_text("utf-8").splitlines() if line][1:]
    else:
        return True
    pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for each in merges]
    return pairs == tokenizer.merges(size)


def _has_chinese_berts_vocabulary(folder: Path, size: int) -> bool:
    """Whether a folder's tokenizer is Chinese BERT's, which is the default if it has none."""
    del size  # the vocabulary has one size
    if (file := folder / tokenizer.FILE).is_file():
        found = read(file).get("model", {}).get("vocab", {})
    elif (file := folder / _WORD_PIECES).is_file():
        lines = file.read_text("utf-8").split("\n")
        found = {line: index for index, line in enumerate(lines)}
    else:
        return True
    pieces = {piece.strip(): index for piece, index in found.items() if piece.strip()}
    return pieces == wordpiece.vocabulary()


def preprocessing(folder: Path, size: int, *, squash: bool) -> dict[str, Any]:
    """`preprocess_cfg`. squash: whether images are squashed unless a file overrides it.

    Raises:
        ConfigurationError: images are not made squares of `size` pixels.
    """
    settings = _image_settings(folder)
    sides = settings.get("size", {"height": size} if squash else {"shortest_edge": size})
    squash = isinstance(sides, Mapping) and "shortest_edge" not in sides
    cropped = settings.get("do_center_crop", not squash)
    crop = settings.get("crop_size", size) if cropped else None
    fits = _side(sides) == size and (_side(crop) == size if cropped else squash)
    if not fits or not settings.get("do_resize", True):
        raise ConfigurationError(
            f"{folder}: images are resized to {sides} and cropped to {crop}, but the model takes "
            f"squares of {size} pixels"
        )
    preprocess = {
        "resize_mode": "squash" if squash else "shortest",
        "crop": "floor",
        "interpolation": _FILTERS.get(settings.get("resample", 3)),
        "mean": settings.get("image_mean"),
        "std": settings.get("image_std"),
    }
    return {key: value for key, value in preprocess.items() if value is not None}


def _side(size: Any) -> int | None:
    """The side of a square, in any of the forms that releases wrote; None if it is no square."""
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    side: int | None = sides.pop() if len(sides) == 1 else None
    return side


def _image_settings(folder: Path) -> dict[str, Any]:
    if (file := folder / _PREPROCESSING).is_file():
        return read(file)
    file = folder / _PROCESSOR
    settings: dict[str, Any] = read(file).get("image_processor", {}) if file.is_file() else {}
    return settings


# Whether a folder's tokenizer has a bundled vocabulary.
_BUNDLED: dict[Vocabulary, Callable[[Path, int], bool]] = {
    "clip": _has_clips_merges,
    "chinese-bert": _has_chinese_berts_vocabulary,
}
