"""The configuration of a gallery: PaddleClas' YAML file, and `-o Section.key=value`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec
from clip_server.search.store import IndexMethod, Settings, parse_metric

MODES = {
    "image_index_build": "image",
    "text_index_build": "text",
    "text-to-image": "image",
    "image-to-image": "image",
    "image-to-text": "text",
    "text-to-text": "text",
}
OPERATIONS = ("new", "append", "remove")
_SECTIONS = ("Global", "PreProcess", "IndexProcess")
_DEFAULT_MODEL = "ViT-B-32::openai"
# What each key may be.
_GLOBAL: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "infer_imgs": (str, list),
    "texts": (str, list),
    "batch_size": (int,),
    "embedding_size": (int,),
    "use_gpu": (bool,),
    "use_fp16": (bool,),
    "use_tensorrt": (bool,),
    "model": (str,),
    "model_path": (str,),
    "server": (str,),
}
_INDEX: dict[str, tuple[type, ...]] = {
    "index_method": (str,),
    "image_index_dir": (str,),
    "text_index_dir": (str,),
    "image_root": (str,),
    "index_operation": (str,),
    "delimiter": (str,),
    "dist_type": (str,),
    "embedding_size": (int,),
    "batch_size": (int,),
    "return_k": (int,),
    "score_thres": (int, float),
    "filter": (dict,),
}
_TYPE_NAMES = {str: "a text", int: "a whole number", bool: "true or false", float: "a number",
               list: "a list", dict: "an object"}  # fmt: skip


@dataclass(frozen=True)
class GalleryConfig:
    """A gallery's sources, queries and location.

    mode: a key of `MODES`.
    infer_imgs, texts: files, folders or patterns with the images, and with the texts.
    model, model_path: as `name` and `model_path` of a flow; server: the address of a running
        server, which then encodes.
    embedding_size: what the model's dimension is expected to be; None: any.
    transform_ops: preprocessing as PaddleClas writes it.
    image_root: the folder that paths in lists are relative to.
    warnings: keys that are not used here.
    """

    mode: str
    infer_imgs: list[str]
    texts: list[str]
    batch_size: int = 64
    embedding_size: int | None = None
    use_gpu: bool | None = None
    use_fp16: bool = False
    use_tensorrt: bool = False
    model: str = _DEFAULT_MODEL
    model_path: str | None = None
    server: str | None = None
    index_method: str = "auto"
    image_index_dir: str | None = None
    text_index_dir: str | None = None
    image_root: str = ""
    index_operation: str = "new"
    delimiter: str = "\t"
    dist_type: str = "IP"
    return_k: int = 10
    score_thres: float | None = None
    filter: Mapping[str, Any] = field(default_factory=dict)
    transform_ops: Sequence[Any] = ()
    warnings: Sequence[str] = ()

    @property
    def modality(self) -> str:
        """The modality of the collection: `image` or `text`."""
        return MODES[self.mode]

    @property
    def queries_are_images(self) -> bool:
        """Whether the mode searches by images."""
        return self.mode.startswith("image-to-")

    def settings(self) -> Settings:
        """The collection of this mode.

        Raises:
            ConfigurationError: its folder is not named, or a value is not allowed.
        """
        key = f"{self.modality}_index_dir"
        folder = getattr(self, key)
        if not folder:
            raise ConfigurationError(f"IndexProcess.{key} is missing, the folder of the collection")
        metric = parse_metric(self.dist_type)
        # PaddleClas normalizes what it indexes: its inner product is the cosine.
        return Settings(
            folder,
            index_method=IndexMethod.parse(self.index_method),
            metric="COSINE" if metric == "IP" else metric,
        )


def read_config(file: Path, overrides: Sequence[str]) -> GalleryConfig:
    """The configuration in a file, with `Section.key=value` in place of its values.

    Raises:
        ConfigurationError: the file cannot be read, a key of `overrides` is unknown, or a value
            is not allowed.
    """
    try:
        written = yaml.safe_load(file.read_text("utf-8")) or {}
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigurationError(f"{file} is not YAML") from None
    if not isinstance(written, dict):
        raise ConfigurationError(f"{file} has none of the sections {', '.join(_SECTIONS)}")
    warnings = [f"{name}: this section is not used" for name in written if name not in _SECTIONS]
    values: dict[str, Any] = {}
    for section, known in (("Global", _GLOBAL), ("IndexProcess", _INDEX)):
        for key, value in (written.get(section) or {}).items():
            if key not in known:
                warnings.append(f"{section}.{key} is not used")
            elif value is not None:
                values[key] = _checked(f"{section}.{key}", value, known[key])
    for override in overrides:
        key, value = _override(override)
        values[key] = value
    transform_ops = (written.get("PreProcess") or {}).get("transform_ops") or ()
    return _build(values, transform_ops, warnings)


def _build(
    values: dict[str, Any], transform_ops: Sequence[Any], warnings: Sequence[str]
) -> GalleryConfig:
    mode = values.setdefault("mode", "image_index_build")
    if mode not in MODES:
        raise ConfigurationError(f"Global.mode: {mode!r} is none of {', '.join(MODES)}")
    operation = values.get("index_operation", "new")
    if operation not in OPERATIONS:
        raise ConfigurationError(
            f"IndexProcess.index_operation: {operation!r} is none of {', '.join(OPERATIONS)}"
        )
    for key in ("batch_size", "return_k"):
        if values.get(key, 1) < 1:
            raise ConfigurationError(f"{key}: {values[key]} is not a whole number from 1")
    values.setdefault("model", os.environ.get("CLIP_MODEL") or _DEFAULT_MODEL)
    for key in ("infer_imgs", "texts"):
        given = values.get(key) or []
        values[key] = [given] if isinstance(given, str) else [str(each) for each in given]
    values["delimiter"] = values.get("delimiter", "\t").replace("\\t", "\t")
    return GalleryConfig(**values, transform_ops=transform_ops, warnings=warnings)


def _override(written: str) -> tuple[str, Any]:
    place, equals, text = written.partition("=")
    section, _, key = place.strip().partition(".")
    known = {"Global": _GLOBAL, "IndexProcess": _INDEX}.get(section, {})
    if not equals or key not in known:
        raise ConfigurationError(
            f"-o {written}: write Section.key=value; the keys are "
            + ", ".join(f"Global.{key}" for key in _GLOBAL)
            + ", "
            + ", ".join(f"IndexProcess.{key}" for key in _INDEX)
        )
    try:
        value = text if known[key] == (str,) else yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigurationError(f"-o {written}: the value is not YAML") from None
    return key, _checked(place, value, known[key])


def _checked(place: str, value: Any, types: tuple[type, ...]) -> Any:
    # A bool is an int to Python, but not to someone who writes YAML.
    if type(value) not in types:
        allowed = " or ".join(_TYPE_NAMES[each] for each in types)
        raise ConfigurationError(f"{place}: {value!r} is not {allowed}")
    return value


def differences(transform_ops: Sequence[Any], spec: ImageSpec) -> list[str]:
    """Describes how the preprocessing of a configuration differs from that of the model."""
    given: dict[tuple[str, str], Any] = {}
    for step in transform_ops:
        if isinstance(step, Mapping):
            for name, options in step.items():
                options = options if isinstance(options, Mapping) else {}
                given.update({(name, key): value for key, value in options.items()})
    expected: dict[tuple[str, str], Any] = {
        ("ResizeImage", "resize_short"): spec.size,
        ("ResizeImage", "size"): spec.size,
        ("ResizeImage", "interpolation"): spec.interpolation,
        ("CropImage", "size"): spec.size,
        ("NormalizeImage", "mean"): spec.mean,
        ("NormalizeImage", "std"): spec.std,
    }
    return [
        f"PreProcess: {step}.{key} is {given[step, key]}; the model's own is used, {value}"
        for (step, key), value in expected.items()
        if (step, key) in given and not _is_same(given[step, key], value)
    ]


def _is_same(given: Any, value: Any) -> bool:
    if isinstance(value, tuple):
        given = given if isinstance(given, list) else [given]
        return len(given) == len(value) and all(
            isinstance(a, int | float) and abs(a - b) < 1e-3
            for a, b in zip(given, value, strict=True)
        )
    if isinstance(given, list):
        return all(_is_same(each, value) for each in given)
    return bool(re.sub(r"\W", "", str(given)).lower() == str(value).lower())
