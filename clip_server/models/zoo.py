"""The models by name. Cards are data (`data/zoo.json`, written by `tools/cards.py` from
open_clip's own tables); this module only reads them."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from clip_server.errors import ConfigurationError, UnknownModelError, WeightsError
from clip_server.model_card import ImageSpec, ModelCard, Precision, TextSpec
from clip_server.models import (
    converted,
    exported,
    hub,
    hugging_face,
    repositories,
    tokenizer_files,
    weights,
)
from clip_server.preprocess import tokenizer
from clip_server.towers import registry

# The language of models that know many.
MULTILINGUAL = "multilingual"
EMBEDDED = "emoji-small::embedded"
EMBEDDED_PATH = Path(__file__).parent / "embedded"

# What Immich writes between an architecture and a tag.
_IMMICH_SEPARATOR = "__"
# The suffix of architectures whose activation is QuickGELU.
_QUICK_GELU = "-quickgelu"
# The maximum in CLIP's training, which most models reach; a checkpoint has its own.
_LOGIT_SCALE = 100.0
# Hugging Face's tokenizers of models for English alone.
_ENGLISH = ("bert-base-uncased", "roberta-base", "timm/ViT-B-16-SigLIP")
# The form of a repository's name on the hub.
_REPOSITORY = re.compile(r"\w[\w.-]*/[\w.-]+")
# Parts of the names of Hugging Face's tokenizers that pad with 0; others pad with 1.
_PADS_WITH_ZERO = ("mt5", "bert-base", "SigLIP2")


@dataclass(frozen=True)
class Cost:
    """What a model costs to serve, computed from its configuration.

    parameters: of both towers.
    image_macs, text_macs: multiply-accumulates of one image, and of one text of the context length;
        None for image towers that are not transformers.
    memory: bytes of the weights, by precision.
    """

    parameters: int
    image_macs: int | None
    text_macs: int | None
    memory: dict[Precision, int]


def cost(card: ModelCard) -> Cost | None:
    """What a model costs, without its weights; None if only torch builds it."""
    if not registry.builds(card.config):
        return None
    # The statistics of batch norms are not parameters.
    tensors = registry.tensor_shapes(card.config).items()
    shapes = {name: shape for name, shape in tensors if ".running_" not in name}
    count = sum(math.prod(shape) for shape in shapes.values())
    int8 = sum(_int8_bytes(name, shape) for name, shape in shapes.items())
    return Cost(
        parameters=count,
        image_macs=registry.image_tower(card.config).macs(card.dim),
        text_macs=registry.text_tower(card.config).macs(card.dim, card.text.context_length),
        memory={"fp32": 4 * count, "fp16": 2 * count, "int8": int8},
    )


def _int8_bytes(name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in int8: matrices in one byte each, tables of tokens in two, the rest as
    it is. The matrices of an MLP may be stored as convolutions of single positions."""
    size = math.prod(shape)
    if len(shape) != 2 and not (".mlp." in name and shape[2:] == (1, 1)):
        return 4 * size
    return 2 * size if "embed" in name else size


def language(card: ModelCard) -> str:
    """The language of a model's texts, as ISO 639-1 has it, or `MULTILINGUAL`."""
    if card.text.vocabulary == "chinese-bert":
        return "zh"
    return "en" if card.text.tokenizer in (None, *_ENGLISH) else MULTILINGUAL


def names() -> list[str]:
    """Every canonical name, the embedded model first."""
    return [EMBEDDED, *_zoo()["checkpoints"]]


def other_names(name: str) -> list[str]:
    """The aliases of a model, by its canonical name or its repository on the hub."""
    if _is_repository(name):
        return [name.partition("/")[2]]
    return [alias for alias, canonical in _aliases().items() if canonical == name]


def resolve(name: str, model_path: str | Path | None = None) -> ModelCard:
    """The card of a model.

    name: a canonical name or an alias; a repository of the hub, whose small files are downloaded
        if necessary; or a person's own model, as its path or as `architecture::path`.
    model_path: the path of a person's own checkpoint, or folder of converted towers, where `name`
        is not one. With an `open_clip_config.json` in its folder, that gives the card and `name` is
        free; else the card is that of `name`, which may be an architecture alone.

    Raises:
        UnknownModelError: no model has this name; similar ones are listed.
        WeightsError: a checkpoint that the card is read from is missing or damaged.
        ConfigurationError: an `open_clip_config.json` describes an unsupported model.
    """
    name, path = _split_path(name, model_path)
    if path is None:
        return _card(_canonical(name))
    if found := converted.read(path):
        return found.card
    # `ViT-B-32::path` names open_clip's architecture; ViT-B-32 alone is OpenAI's model. Names of
    # models that are not open_clip's mean the same in both.
    known = None if model_path is None and _is_ambiguous(name) else _find_canonical(name)
    if card := _described_card(name, path):
        return card
    return _card(known) if known else _card_for_checkpoint(name, path)


def own_path(name: str, model_path: str | Path | None) -> Path | None:
    """The path of a person's own model, from its name or `model_path` as in `resolve`, or the
    folder of a repository in the hub's cache; None if it is a model of the list. A leading ~ is
    replaced by the home directory."""
    return _split_path(name, model_path)[1]


def repository(name: str, model_path: str | Path | None = None) -> str | None:
    """The repository of the hub that a model is named by, if it is."""
    return name if model_path is None and _is_repository(name) else None


def find_checkpoint(name: str, model_path: str | Path | None = None) -> Path | None:
    """The file with a model's weights, as `checkpoint`; None if it would have to be downloaded."""
    card, path = resolve(name, model_path), _weights_path(name, model_path)
    return weights.local(path) if path is not None else weights.cached(card)


def checkpoint(name: str, model_path: str | Path | None = None) -> Path:
    """The file with a model's weights. It is downloaded if necessary, and so are the files of its
    tokenizer, and of its image tower if that is another model's.

    Raises:
        UnknownModelError, WeightsError: as `resolve` and `weights.find`.
    """
    card, path = resolve(name, model_path), _weights_path(name, model_path)
    if path is not None:
        if named := repository(name, model_path):
            repositories.fetch_checkpoint(named, path)
        if path.is_dir() and weights.in_folder(path) is None:
            exported.refuse(path)
        converted.refuse(path)
    file = weights.find(card, path)
    if card.image_of is not None:
        checkpoint(card.image_of)
    tokenizer_files.fetch(card.text)
    tower = registry.text_tower(card.config)
    if tower.hub is not None and not Path(tower.hub).is_dir():
        hub.fetch_optional(tower.hub, hugging_face.CONFIG)  # for torch alone
    return file


def card_from_config(
    name: str,
    config: Mapping[str, Any],
    preprocess: Mapping[str, Any],
    *,
    logit_scale: float = _LOGIT_SCALE,
    hub: str | None = None,
    hub_file: str | None = None,
    image_of: str | None = None,
    licence: str = "",
    folder: Path | None = None,
) -> ModelCard:
    """A card from open_clip's JSON form.

    config: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu` where it is true, and
        `preprocess_cfg` where all models of an architecture have one.
    preprocess: `mean`, `std`, `interpolation`, `resize_mode`, `crop`; absent ones are as in CLIP.
    folder: searched for the tokenizer before the hub.

    Raises:
        ConfigurationError: it lacks a part, or needs unsupported preprocessing.
    """
    try:
        return ModelCard(
            name=name,
            dim=config["embed_dim"],
            image=_image_spec(
                config["vision_cfg"], {**config.get("preprocess_cfg", {}), **preprocess}
            ),
            text=_text_spec(config, folder),
            logit_scale=logit_scale,
            config=dict(config),
            hub=hub,
            hub_file=hub_file,
            image_of=image_of,
            logit_bias=config.get("init_logit_bias"),
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
        crop=preprocess.get("crop", spec.crop),
    )


def _text_spec(config: Mapping[str, Any], folder: Path | None) -> TextSpec:
    text, tower = config["text_cfg"], registry.text_tower(config)
    if mode := text.get("tokenizer_mode"):
        raise ConfigurationError(f"tokenizer_mode {mode!r} is not supported")
    spec = TextSpec()
    source, options = text.get("hf_tokenizer_name"), text.get("tokenizer_kwargs", {})
    if source and folder is not None and (folder / tokenizer.FILE).is_file():
        source = str(folder)
    return TextSpec(
        tokenizer=source,
        context_length=text.get("context_length", spec.context_length),
        vocab_size=text.get("vocab_size", spec.vocab_size),
        pad_id=_pad_id(source) if tower.pad_id is None else tower.pad_id,
        trim=tower.trim,
        clean=options.get("clean", "whitespace" if source else spec.clean),
        strip_separator=options.get("strip_sep_token", False),
        vocabulary=text.get("vocabulary", spec.vocabulary),
    )


def _pad_id(source: str | None) -> int:
    """The padding token of a tokenizer. source: a folder or a repository; None: CLIP's own."""
    if source is None:
        return TextSpec.pad_id
    if Path(source, tokenizer.FILE).is_file():
        return _pad_id_of_folder(source)
    return int(not any(part in source for part in _PADS_WITH_ZERO))


@cache
def _pad_id_of_folder(folder: str) -> int:
    return tokenizer.tokenizer_for(TextSpec(tokenizer=folder)).spec.pad_id


@cache
def _zoo() -> dict[str, Any]:
    data = resources.files(__package__).joinpath("data/zoo.json").read_text("utf-8")
    zoo: dict[str, Any] = json.loads(data)
    return zoo


@cache
def _aliases() -> dict[str, str]:
    """OpenAI's names, architectures alone for OpenAI's weights, and open_clip's alternative names
    of architectures with QuickGELU."""
    aliases = {"embedded": EMBEDDED, **_zoo()["aliases"]}
    for name, entry in _zoo()["checkpoints"].items():
        architecture, _, tag = name.partition("::")
        if tag == "openai":
            aliases[architecture] = name
        if entry.get("quick_gelu"):
            aliases[f"{architecture}{_QUICK_GELU}::{tag}"] = name
    return aliases


def _canonical(name: str) -> str:
    known = _find_canonical(name)
    if known is None:
        raise UnknownModelError(_unknown(name))
    return known


def _find_canonical(name: str) -> str | None:
    """The canonical name. As in open_clip, `/` means `-`, and in tags `-` means `_`; as in Immich,
    `__` means `::`."""
    architecture, separator, tag = name.replace(_IMMICH_SEPARATOR, "::").partition("::")
    same = architecture.replace("/", "-") + separator + tag.lower().replace("-", "_")
    for spelling in (name, same):
        if spelling in _aliases():
            return _aliases()[spelling]
        if spelling == EMBEDDED or spelling in _zoo()["checkpoints"]:
            return spelling
    return None


def _unknown(name: str) -> str:
    similar = [known for known in names() if known.startswith(f"{name}::")][:3]
    if not similar:
        known = {known.lower(): known for known in [*names(), *_aliases()]}
        matches = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        similar = [known[match] for match in matches]
    hint = f"did you mean {' or '.join(similar)}? " if similar else ""
    return (
        f"no model is named {name!r}: {hint}`python -m clip_server.models` lists the "
        f"{len(names())} names; or give the path of a checkpoint, as architecture::path"
    )


@cache
def _card(name: str) -> ModelCard:
    """The card of a canonical name."""
    if name == EMBEDDED:
        card = _described_card(EMBEDDED, EMBEDDED_PATH)
        if card is None:
            raise WeightsError(f"this installation lacks the embedded model ({EMBEDDED_PATH})")
        return replace(card, licence="Apache-2.0")
    entry = _zoo()["checkpoints"][name]
    return card_from_config(
        name,
        _architecture(name.partition("::")[0], quick_gelu=entry.get("quick_gelu", False)),
        entry.get("preprocess", {}),
        hub=entry["hub"],
        hub_file=entry.get("file"),
        image_of=entry.get("image_of"),
        licence=entry.get("licence", ""),
    )


def _architecture(name: str, *, quick_gelu: bool = False) -> dict[str, Any]:
    """open_clip's configuration of an architecture."""
    config: dict[str, Any] = _zoo()["architectures"][name.removesuffix(_QUICK_GELU)]
    quick = quick_gelu or name.endswith(_QUICK_GELU) or config.get("quick_gelu", False)
    return config | {"quick_gelu": quick}


def _is_architecture(name: str) -> bool:
    return name.removesuffix(_QUICK_GELU) in _zoo()["architectures"]


def _is_ambiguous(name: str) -> bool:
    return _is_architecture(name) and name not in _zoo()["checkpoints"]


def _weights_path(name: str, model_path: str | Path | None) -> Path | None:
    """The path of weights that are not on the hub: a person's own, or the embedded model's."""
    own = own_path(name, model_path)
    return EMBEDDED_PATH if own is None and resolve(name).name == EMBEDDED else own


def _split_path(name: str, model_path: str | Path | None) -> tuple[str, Path | None]:
    """A name, and the path of a person's own model, which may be part of the name."""
    if model_path is not None:
        return name, _expanded(model_path)
    architecture, separator, place = name.rpartition("::")
    if _find_canonical(name) is None and _is_path(place, bool(separator)):
        return architecture, _expanded(place)
    if _is_repository(name):
        return name, _repository_folder(name)
    return name, None


def _is_repository(name: str) -> bool:
    """Whether what is no known name is that of a repository of the hub, which is not looked up.

    A name that begins like a known one, such as ViT-B/33, is a misspelt one.
    """
    if _find_canonical(name) or not _REPOSITORY.fullmatch(name) or name.endswith(weights.SUFFIXES):
        return False
    owner = name.partition("/")[0].lower()
    return not any(known.lower().startswith(owner) for known in (*names(), *_aliases()))


def _repository_folder(name: str) -> Path:
    try:
        return repositories.folder(name)
    except WeightsError as error:
        raise WeightsError(
            f"no model is named {name!r}, and no repository of the hub was found: {error}"
        ) from error


def _is_path(text: str, is_tag: bool) -> bool:
    """Whether what is no known name is the path of a model.

    is_tag: whether it stands where tags do, none of which has a / in it.
    """
    looks_like_one = text.endswith(weights.SUFFIXES) or text.startswith(("/", "./", "../", "~"))
    return looks_like_one or ("/" in text and (is_tag or Path(text).exists()))


def _expanded(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user, or no home directory
        return Path(path)


def _card_for_checkpoint(name: str, path: Path) -> ModelCard:
    """The card of a checkpoint without a configuration in its folder.

    name: of an architecture, or empty.
    """
    name = name or _read_architecture(path)
    if not _is_architecture(name):
        raise UnknownModelError(_unknown(name))
    return card_from_config(f"{name}::{path.stem}", _architecture(name), {})


def _read_architecture(path: Path) -> str:
    """The name of the architecture whose tensors have the shapes of a checkpoint's."""
    file = weights.local(path)
    shapes = weights.read_shapes(file)
    found: list[str] = [
        name
        for name, config in _zoo()["architectures"].items()
        if registry.builds(config)
        and not weights.differences(shapes, registry.tensor_shapes(config))
    ]
    if len(found) != 1:
        which = f"it may be {' or '.join(found)}" if found else "no architecture has its tensors"
        raise ConfigurationError(
            f"the architecture of {file} cannot be detected ({which}): "
            f"give its name as architecture::{path}"
        )
    return found[0]


def _described_card(name: str, path: Path) -> ModelCard | None:
    """The card of a checkpoint, or of graphs that others exported, with a configuration in its
    folder."""
    folder, file = path if path.is_dir() else path.parent, weights.in_folder(path)
    # Graphs as clip-as-service keeps them are described by their name.
    if file is None and (not path.is_dir() or any(path.glob("visual.*"))):
        return None
    if (config := _description(folder)) is None:
        return None
    image_of = config.get("image_of")
    return card_from_config(
        name or path.stem,
        config.get("model_cfg", config),
        config.get("preprocess_cfg", {}),
        logit_scale=weights.read_logit_scale(file) if file and not image_of else _LOGIT_SCALE,
        image_of=image_of,
        folder=folder,
    )


def _description(folder: Path) -> dict[str, Any] | None:
    """The configuration in a folder, written by open_clip, Hugging Face or exporters of graphs."""
    file = folder / weights.CONFIG
    if not file.is_file():
        return exported.configuration(folder) or hugging_face.configuration(folder)
    try:
        config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON: {error}") from error
    return config
