"""A folder that transformers saved a CLIPModel or ChineseCLIPModel in: its configuration in
open_clip's terms. Its weights are read as any others (see `names`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError
from clip_server.models import tokenizer, wordpiece

CONFIG = "config.json"
# How pictures are prepared: in a file of its own, or in that of the whole processor.
_PREPROCESSING, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
# Where a tokenizer is that has no `tokenizer.json`.
_MERGES, _WORD_PIECES = "merges.txt", "vocab.txt"
_CLIP, _CHINESE = "clip", "chinese_clip"
# M-CLIP's, which does not say enough of its towers: its name does.
_TEXT_ALONE = "M-CLIP"
# What a configuration leaves out where it is as in the first model of its kind.
_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_BERT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}
_EPSILON = 1e-5
# Chinese-CLIP was trained with this many tokens, though it has places for more.
_CHINESE_CONTEXT = 52
# Configurations of before the end token's id was put right have this one.
_OLD_END = 2
# Pillow's numbers of the filters.
_FILTERS = {2: "bilinear", 3: "bicubic"}


def configuration(folder: Path) -> dict[str, Any] | None:
    """`model_cfg` and `preprocess_cfg`, as an `open_clip_config.json` has them, of a folder with
    a `config.json`; None where there is none, or it is M-CLIP's.

    Raises:
        ConfigurationError: it is of another kind of model, or asks for what we do not do.
    """
    file = folder / CONFIG
    if not file.is_file():
        return None
    config = _read(file)
    kind = config.get("model_type")
    if kind == _TEXT_ALONE:
        return None
    if kind not in (_CLIP, _CHINESE):
        raise ConfigurationError(
            f"{file} is of a {kind!r} model: of Hugging Face's, {_CLIP!r} and {_CHINESE!r} are read"
        )
    vision: dict[str, Any] = _VISION | _part(config, "vision")
    model = {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": _is_quick(file, vision),
        "vision_cfg": _vision(vision),
    }
    if kind == _CHINESE:
        text = _bert(_BERT | _part(config, "text"), folder)
    else:
        text = _causal(_TEXT | _part(config, "text"), model["quick_gelu"], folder)
    return {
        "model_cfg": model | {"text_cfg": text},
        "preprocess_cfg": _preprocessing(folder, vision["image_size"], squash=kind == _CHINESE),
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: {error}") from error
    return found


def _part(config: dict[str, Any], part: str) -> dict[str, Any]:
    """What is said of a tower; in older files the second place overrides the first."""
    said = {**(config.get(f"{part}_config") or {}), **(config.get(f"{part}_config_dict") or {})}
    return {key: value for key, value in said.items() if value is not None}


def _vision(vision: dict[str, Any]) -> dict[str, Any]:
    width = vision["hidden_size"]
    return {
        "image_size": vision["image_size"],
        "layers": vision["num_hidden_layers"],
        "width": width,
        "head_width": width // vision["num_attention_heads"],
        "patch_size": vision["patch_size"],
        "mlp_ratio": vision["intermediate_size"] / width,
    }


def _causal(text: dict[str, Any], quick_gelu: bool, folder: Path) -> dict[str, Any]:
    if _is_quick(folder / CONFIG, text) != quick_gelu:
        raise ConfigurationError(f"{folder / CONFIG}: the towers have different activations")
    width, vocabulary, end = text["hidden_size"], text["vocab_size"], text["eos_token_id"]
    config = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": vocabulary,
        "width": width,
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / width,
    }
    if end not in (_OLD_END, vocabulary - 1):
        config |= {"pool_type": "eos", "eos_id": end}
    if not _has_clips_merges(folder, vocabulary):
        config |= _own_tokenizer(folder)
    return config


def _bert(text: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = {
        "context_length": _CHINESE_CONTEXT,
        "vocab_size": text["vocab_size"],
        "bert": {
            "width": text["hidden_size"],
            "layers": text["num_hidden_layers"],
            "heads": text["num_attention_heads"],
            "mlp_width": text["intermediate_size"],
            "vocab_size": text["vocab_size"],
            "positions": text["max_position_embeddings"],
            "types": text["type_vocab_size"],
            "pad_id": text["pad_token_id"],
            "epsilon": text["layer_norm_eps"],
        },
    }
    if text["hidden_act"] != "gelu":
        raise ConfigurationError(f"{folder / CONFIG}: hidden_act {text['hidden_act']!r} of a BERT")
    if _has_chinese_berts_vocabulary(folder):
        return config | {"vocabulary": "chinese-bert"}
    return config | _own_tokenizer(folder)


def _own_tokenizer(folder: Path) -> dict[str, Any]:
    return {"hf_tokenizer_name": str(folder), "tokenizer_kwargs": {"clean": "none"}}


def _has_clips_merges(folder: Path, vocabulary: int) -> bool:
    """Whether a tokenizer is CLIP's own, as it is where no file tells otherwise."""
    if (file := folder / tokenizer.FILE).is_file():
        merges = _read(file).get("model", {}).get("merges", [])
    elif (file := folder / _MERGES).is_file():
        merges = [line for line in file.read_text("utf-8").splitlines() if line][1:]
    else:
        return True
    pairs = [tuple(each.split(" ") if isinstance(each, str) else each) for each in merges]
    return pairs == tokenizer.merges(vocabulary)


def _has_chinese_berts_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer is Chinese BERT's, as it is where no file tells otherwise."""
    if (file := folder / tokenizer.FILE).is_file():
        found = _read(file).get("model", {}).get("vocab", {})
    elif (file := folder / _WORD_PIECES).is_file():
        lines = file.read_text("utf-8").split("\n")
        found = {line: index for index, line in enumerate(lines)}
    else:
        return True
    pieces = {piece.strip(): index for piece, index in found.items() if piece.strip()}
    return pieces == wordpiece.vocabulary()


def _preprocessing(folder: Path, size: int, *, squash: bool) -> dict[str, Any]:
    """squash: what is done where no file tells otherwise."""
    said = _said_of_pictures(folder)
    sides = said.get("size", {"height": size} if squash else {"shortest_edge": size})
    squash = isinstance(sides, Mapping) and "shortest_edge" not in sides
    cropped = said.get("do_center_crop", not squash)
    crop = said.get("crop_size", size) if cropped else None
    fits = _side(sides) == size and (_side(crop) == size if cropped else squash)
    if not fits or not said.get("do_resize", True):
        raise ConfigurationError(
            f"{folder}: pictures are resized to {sides} and cropped to {crop}, but the model takes "
            f"squares of {size} pixels"
        )
    preprocess = {
        "resize_mode": "squash" if squash else "shortest",
        "crop": "floor",
        "interpolation": _FILTERS.get(said.get("resample", 3)),
        "mean": said.get("image_mean"),
        "std": said.get("image_std"),
    }
    return {key: value for key, value in preprocess.items() if value is not None}


def _side(size: Any) -> int | None:
    """Of a square, as the different releases wrote it; None where it is none."""
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    side: int | None = sides.pop() if len(sides) == 1 else None
    return side


def _said_of_pictures(folder: Path) -> dict[str, Any]:
    if (file := folder / _PREPROCESSING).is_file():
        return _read(file)
    file = folder / _PROCESSOR
    said: dict[str, Any] = _read(file).get("image_processor", {}) if file.is_file() else {}
    return said


def _is_quick(file: Path, tower: Mapping[str, Any]) -> bool:
    activation = tower["hidden_act"]
    if activation not in ("quick_gelu", "gelu") or tower["layer_norm_eps"] != _EPSILON:
        raise ConfigurationError(
            f"{file}: hidden_act {activation!r} with layer_norm_eps {tower['layer_norm_eps']} is "
            "not CLIP's: quick_gelu or gelu, and 1e-05"
        )
    return bool(activation == "quick_gelu")
