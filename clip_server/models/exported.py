"""Graphs that others exported, in the folders and repositories in which they publish them:

Immich            config.json, which is open_clip's; visual/model.onnx, textual/model.onnx,
                  visual/preprocess_cfg.json, textual/tokenizer.json
transformers.js   config.json, which is transformers'; onnx/vision_model.onnx and
                  onnx/text_model.onnx, or both with the suffix of a precision, such as _fp16;
                  preprocessor_config.json, tokenizer.json

The graphs run as they are: `runtimes.onnx_graph` finds their inputs and outputs.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clip_server.errors import ConfigurationError
from clip_server.model_card import Precision, TextSpec, Trim, Vocabulary
from clip_server.models import hub, hugging_face
from clip_server.models.converted import TOWERS, Tower
from clip_server.preprocess import tokenizer

# Small files that describe the graphs, apart from `config.json`.
DESCRIPTIONS = (
    "visual/preprocess_cfg.json",
    *(f"textual/{file}" for file in (tokenizer.FILE, tokenizer.CONFIG)),
)
_PREPROCESSING = DESCRIPTIONS[0]
# Longer texts are truncated, although some models have positions for thousands of tokens.
_MAX_CONTEXT = 512
# What transformers leaves out of `config.json`: its defaults.
_POSITIONS = {"clip": 77, "siglip": 64, "siglip2": 64}
_VOCABULARY_SIZES = {"clip": 49408, "siglip": 32000, "siglip2": 256000}
_IMAGE_SIZE = 224
_BUNDLED: dict[str, Vocabulary] = {"clip": "clip", "chinese_clip": "chinese-bert"}
_TRIMS: dict[str, Trim] = {"clip": "causal", "siglip": "fixed", "siglip2": "fixed"}
# The logit bias that SigLIP's training began with; graphs do not contain the trained one.
_LOGIT_BIAS = -10
# Graphs of more bytes contain their weights: their other files are looked for only when they are
# downloaded.
MAX_WITHOUT_WEIGHTS = 100_000_000


@dataclass(frozen=True)
class Layout:
    """names: of the graphs, without suffixes. variants: suffixes of the names, by precision."""

    names: Mapping[Tower, str]
    variants: Mapping[Precision, tuple[str, ...]]

    def pairs(self, precision: str | None) -> Iterator[tuple[Precision, dict[Tower, str]]]:
        """The possible files of both towers, with their precision, the preferred ones first.

        precision: that is wanted; None: any.
        """
        for each, suffixes in self.variants.items():
            for suffix in suffixes if precision in (None, each) else ():
                yield each, {tower: f"{self.names[tower]}{suffix}.onnx" for tower in TOWERS}


_IMMICH = Layout({"image": "visual/model", "text": "textual/model"}, {"fp32": ("",)})
_TRANSFORMERS_JS = Layout(
    {"image": "onnx/vision_model", "text": "onnx/text_model"},
    {"fp32": ("",), "fp16": ("_fp16",), "int8": ("_quantized", "_int8", "_uint8")},
)
_LAYOUTS = (_IMMICH, _TRANSFORMERS_JS)


class Exported(NamedTuple):
    """The graphs of both towers, and their precision."""

    files: Mapping[Tower, Path]
    precision: Precision


def find(folder: Path, precision: str | None = None) -> Exported | None:
    """The graphs in a folder; None if it lacks them, or has them in other precisions only.

    precision: that is wanted; None: the first that the folder has.
    """
    for layout in _LAYOUTS:
        for found, names in layout.pairs(precision):
            files = {tower: folder / name for tower, name in names.items()}
            if all(file.is_file() for file in files.values()):
                return Exported(files, found)
    return None


def fetch(repository: str, folder: Path, precision: str | None = None) -> Exported | None:
    """As `find`, of a repository of the hub; the graphs are downloaded if necessary.

    folder: of the repository in the hub's cache.

    Raises:
        WeightsError: the hub cannot be reached.
        ConfigurationError: a graph refers to files outside of the repository.
    """
    cached = find(folder, precision)
    found = cached or _download(repository, precision)
    for file in found.files.values() if found else ():
        if cached is None or file.stat().st_size <= MAX_WITHOUT_WEIGHTS:
            _fetch_external_data(repository, folder, file)
    return found


def _download(repository: str, precision: str | None) -> Exported | None:
    for layout in _LAYOUTS:
        for found, names in layout.pairs(precision):
            files = {tower: hub.fetch_optional(repository, name) for tower, name in names.items()}
            present = {tower: file for tower, file in files.items() if file}
            if len(present) == len(TOWERS):
                return Exported(present, found)
    return None


def _fetch_external_data(repository: str, folder: Path, graph: Path) -> None:
    """Downloads the files that hold a graph's weights, if they are not in the graph itself."""
    from clip_server.towers import onnx_file  # which needs the onnx package

    place = graph.relative_to(folder).parent.as_posix()
    for location in onnx_file.external_files(graph):
        file = posixpath.normpath(posixpath.join(place, location))
        if file.startswith(("/", "../")):
            raise ConfigurationError(
                f"{graph} has weights in {location}, which is outside of its repository"
            )
        hub.fetch(repository, file)


def refuse(folder: Path) -> None:
    """Raises ConfigurationError if a folder has exported graphs, and so is not a checkpoint."""
    places = {Path(name).parent for layout in _LAYOUTS for name in layout.names.values()}
    graphs = sorted(
        path.relative_to(folder).as_posix()
        for place in places
        for path in (folder / place).glob("*.onnx")
    )
    if graphs:
        raise ConfigurationError(
            f"{folder} holds no checkpoint, only the graphs {', '.join(graphs)}; {served()}"
        )


def served() -> str:
    """Says which graphs are served, for error messages."""
    pairs = (" and ".join(f"{name}.onnx" for name in each.names.values()) for each in _LAYOUTS)
    suffixes = _TRANSFORMERS_JS.variants
    return (
        f"the ONNX runtime serves {', or '.join(pairs)}, which with dtype fp16 end in "
        f"{suffixes['fp16'][0]}.onnx, and with int8 in "
        f"{' or '.join(f'{suffix}.onnx' for suffix in suffixes['int8'])}"
    )


def configuration(folder: Path) -> dict[str, Any] | None:
    """Reads the description of the graphs in a folder: `model_cfg` and `preprocess_cfg`, in the
    form of an `open_clip_config.json`; None if the folder is of another kind.

    Raises:
        ConfigurationError: it has an unsupported setting.
    """
    file = folder / hugging_face.CONFIG
    if not file.is_file():
        return None
    config = hugging_face.read(file)
    if "vision_cfg" in config and "text_cfg" in config:
        return _of_immich(folder, config)
    if any((folder / "onnx").glob("*.onnx")):
        return _of_transformers_js(folder, config)
    return None


def _of_immich(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    file, textual, text = folder / _PREPROCESSING, folder / "textual", config["text_cfg"]
    preprocess = hugging_face.read(file) if file.is_file() else {}
    size = text.get("vocab_size", TextSpec.vocab_size)
    if (textual / tokenizer.FILE).is_file():
        if "hf_tokenizer_name" in text:
            text = text | {"hf_tokenizer_name": str(textual)}
        elif hugging_face.tokenizer_keys(textual, "clip", size):
            # M-CLIP's, described by the configuration of the model with its image tower.
            text = {
                "context_length": text.get("context_length", TextSpec.context_length),
                "hf_tokenizer_name": str(textual),
                "exported": "masked",
            }
    return {"model_cfg": config | {"text_cfg": text}, "preprocess_cfg": preprocess}


def _of_transformers_js(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type", "")
    text, vision = (config.get(f"{part}_config") or {} for part in ("text", "vision"))
    size = text.get("vocab_size", _VOCABULARY_SIZES.get(kind))
    image_size = vision.get("image_size", _IMAGE_SIZE)
    described = {
        "embed_dim": config.get("projection_dim") or text.get("hidden_size", 512),
        "vision_cfg": {"image_size": image_size, "exported": True},
        "text_cfg": {
            "context_length": _context(folder, text, kind),
            "exported": _TRIMS.get(kind, "masked"),
            **hugging_face.tokenizer_keys(folder, _BUNDLED.get(kind), size or TextSpec.vocab_size),
            **({"vocab_size": size} if size else {}),
        },
    }
    if kind.startswith("siglip"):
        described["init_logit_bias"] = _LOGIT_BIAS
    preprocess = hugging_face.preprocessing(folder, image_size, squash=False)
    return {"model_cfg": described, "preprocess_cfg": preprocess}


def _context(folder: Path, text: Mapping[str, Any], kind: str) -> int:
    """The most tokens of a text: the least of what the model and its tokenizer take."""
    file = folder / tokenizer.CONFIG
    settings = hugging_face.read(file) if file.is_file() else {}
    lengths = (
        text.get("max_position_embeddings", _POSITIONS.get(kind)),
        settings.get("model_max_length"),
    )
    return int(min((_MAX_CONTEXT, *(length for length in lengths if length))))
