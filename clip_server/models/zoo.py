"""The models by name. Cards are data (`data/zoo.json`); this module only reads them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError, UnknownModelError, WeightsError
from clip_server.models import weights
from clip_server.models.card import ImageSpec, ModelCard, TextSpec

EMBEDDED = "emoji-small::embedded"
EMBEDDED_PATH = Path(__file__).parent / "embedded"


def names() -> list[str]:
    """Every canonical name, the embedded model first."""
    return [EMBEDDED, *_zoo()["checkpoints"]]


def resolve(name: str, model_path: str | Path | None = None) -> ModelCard:
    """The card of a model, by canonical name or alias.

    model_path: where a person keeps a checkpoint. With an `open_clip_config.json` beside it,
        that gives the card and `name` is free; else the card is that of `name`.

    Raises:
        UnknownModelError: no model has this name; the nearest ones are listed.
        WeightsError: a checkpoint that the card is read from is missing or damaged.
        ConfigurationError: an `open_clip_config.json` describes a model we do not know.
    """
    if model_path is not None and (card := _own_card(name, Path(model_path))):
        return card
    canonical = _canonical(name)
    if canonical == EMBEDDED:
        return _embedded_card()
    zoo = _zoo()
    entry = zoo["checkpoints"][canonical]
    return card_from_config(
        canonical,
        zoo["architectures"][canonical.partition("::")[0]] | {"quick_gelu": entry["quick_gelu"]},
        entry.get("preprocess", {}),
        logit_scale=entry["logit_scale"],
        hub=entry["hub"],
        licence=entry["licence"],
    )


def checkpoint(name: str, model_path: str | Path | None = None) -> Path:
    """The safetensors file with a model's weights, downloaded if it has to be.

    Raises:
        UnknownModelError, WeightsError: as `resolve` and `weights.find`.
    """
    if model_path is None and _canonical(name) == EMBEDDED:
        model_path = EMBEDDED_PATH
    return weights.find(resolve(name, model_path), model_path)


def card_from_config(
    name: str,
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    *,
    logit_scale: float,
    hub: str | None = None,
    licence: str = "",
) -> ModelCard:
    """A card from open_clip's JSON form.

    config: `embed_dim`, `vision_cfg`, `text_cfg`, and `quick_gelu` where it is true.
    preprocess: `mean`, `std`, `interpolation`, `resize_mode`; what is absent is as in CLIP.

    Raises:
        ConfigurationError: it lacks a part, or asks for preprocessing we do not do.
    """
    try:
        return ModelCard(
            name=name,
            dim=config["embed_dim"],
            image=_image_spec(config["vision_cfg"], preprocess),
            text=_text_spec(config["text_cfg"]),
            logit_scale=logit_scale,
            config=dict(config),
            hub=hub,
            licence=licence,
        )
    except KeyError as error:
        raise ConfigurationError(f"the configuration of {name} has no {error}") from None


def _image_spec(vision: Mapping[str, Any], preprocess: Mapping[str, Any]) -> ImageSpec:
    size = vision.get("image_size", 224)
    if isinstance(size, list):
        if len(set(size)) != 1:
            raise ConfigurationError(f"only square images are supported, not {size}")
        size = size[0]
    spec = ImageSpec(size)
    resize = preprocess.get("resize_mode", spec.resize)
    if resize not in ("shortest", "squash"):
        raise ConfigurationError(f"resize_mode {resize!r} is not supported: shortest or squash")
    return ImageSpec(
        size,
        mean=tuple(preprocess.get("mean", spec.mean)),
        std=tuple(preprocess.get("std", spec.std)),
        resize=resize,
        interpolation=preprocess.get("interpolation", spec.interpolation),
    )


def _text_spec(text: Mapping[str, Any]) -> TextSpec:
    spec = TextSpec()
    return TextSpec(
        context_length=text.get("context_length", spec.context_length),
        vocab_size=text.get("vocab_size", spec.vocab_size),
        pad_id=text.get("pad_id", spec.pad_id),
        trim="fixed" if text.get("no_causal_mask") else "causal",
    )


@cache
def _zoo() -> dict[str, Any]:
    data = resources.files(__package__).joinpath("data/zoo.json").read_text("utf-8")
    zoo: dict[str, Any] = json.loads(data)
    return zoo


@cache
def _aliases() -> dict[str, str]:
    checkpoints = _zoo()["checkpoints"]
    aliases = {alias: name for name, entry in checkpoints.items() for alias in entry["aliases"]}
    return aliases | {"embedded": EMBEDDED}


def _canonical(name: str) -> str:
    if name in names():
        return name
    if name in _aliases():
        return _aliases()[name]
    known = {known.lower(): known for known in [*names(), *_aliases()]}
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(known[match] for match in near)}? " if near else ""
    raise UnknownModelError(
        f"no model is named {name!r}: {hint}The names are {', '.join(names())}; or give a "
        "model_path to a folder with open_clip_config.json and open_clip_model.safetensors"
    )


@cache
def _embedded_card() -> ModelCard:
    card = _own_card(EMBEDDED, EMBEDDED_PATH)
    if card is None:
        raise WeightsError(f"this installation lacks the embedded model ({EMBEDDED_PATH})")
    return card


def _own_card(name: str, path: Path) -> ModelCard | None:
    """The card of a checkpoint that has its configuration beside it."""
    folder, file = (path, path / weights.CHECKPOINT) if path.is_dir() else (path.parent, path)
    if not (file.is_file() and (folder / weights.CONFIG).is_file()):
        return None
    try:
        config = json.loads((folder / weights.CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{folder / weights.CONFIG} is not JSON: {error}") from error
    return card_from_config(
        name,
        config.get("model_cfg", config),
        config.get("preprocess_cfg", {}),
        logit_scale=weights.read_logit_scale(file),
    )
