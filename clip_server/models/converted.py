"""Folders of converted models, which are served without any other file:

visual.onnx, textual.onnx   the towers (or visual.pt, textual.pt: TorchScript;
                            visual.trt, textual.trt: TensorRT engines)
visual.onnx.data            the weights of a graph that is too large for one file
card.json                   the card, and the precision of the towers
tokenizer.json              if the card names a Hugging Face tokenizer
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, ModelCard, TextSpec
from clip_server.models import tokenizer_files, weights
from clip_server.preprocess import tokenizer

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = get_args(Tower)

CARD = "card.json"
# The towers' files, without the suffix.
_STEMS: dict[Tower, str] = {"image": "visual", "text": "textual"}


@dataclass(frozen=True)
class TowerFiles:
    """The files of a converted model's two towers.

    kind: their name in the convert command (`--to`).
    suffixes: that they may have; the convert command writes the first.
    described: whether they can only be served with a `card.json`.
    """

    kind: str
    suffixes: tuple[str, ...]
    described: bool = False

    @property
    def names(self) -> Mapping[Tower, str]:
        """The names that the convert command gives them."""
        return {tower: stem + self.suffixes[0] for tower, stem in _STEMS.items()}

    def find(self, folder: str | Path) -> Mapping[Tower, Path] | None:
        """The files in a folder, if it has both towers."""
        found = {
            tower: file
            for tower, stem in _STEMS.items()
            for suffix in reversed(self.suffixes)
            if (file := Path(folder, stem + suffix)).is_file()
        }
        if self.described and not Path(folder, CARD).is_file():
            return None
        return found if len(found) == len(_STEMS) else None


class Converted(NamedTuple):
    """The content of `card.json`: the model, and the precision of its towers, such as `fp16`."""

    card: ModelCard
    precision: str


def read(folder: str | Path) -> Converted | None:
    """Reads the `card.json` of a folder; None if there is none.

    Raises:
        ConfigurationError: the file is not one that `write` wrote.
    """
    file = Path(folder, CARD)
    if not file.is_file():
        return None
    try:
        return _parsed(json.loads(file.read_text("utf-8")), file.parent)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"{file} is not the card of a model: {error}") from error


def check_precision(folder: str | Path, wanted: str | None, found: str = "fp32") -> str:
    """The precision of the towers in a folder, which run unchanged.

    found: the precision of towers without a `card.json`.

    Raises:
        ConfigurationError: another one is wanted.
    """
    described = read(folder)
    precision = described.precision if described else found
    if wanted not in (None, precision):
        raise ConfigurationError(
            f"dtype {wanted!r} is for checkpoints: the towers in {folder} run unchanged, "
            f"in {precision}"
        )
    return precision


def refuse(folder: Path) -> None:
    """Raises ConfigurationError if a folder has towers instead of a checkpoint, but not both for
    the runtime, which would otherwise not look for a checkpoint."""
    described = read(folder) is not None
    if not folder.is_dir() or (not described and weights.in_folder(folder)):
        return
    stems = tuple(_STEMS.values())
    found = sorted(file.name for file in folder.iterdir() if file.stem in stems)
    if found or described:
        raise ConfigurationError(
            f"{folder} holds no checkpoint, and is without both towers for this runtime; it has "
            f"{', '.join(found) or 'no tower'}: convert the model for this runtime "
            "(python -m clip_server.convert), or use the runtime that they were made for"
        )


def write(folder: Path, card: ModelCard, precision: str) -> None:
    """Writes `card.json`, and the files of the tokenizer if the card names one."""
    for file in tokenizer_files.files(card.text):
        _copy(file, folder / file.name)
    described = {"precision": precision, **asdict(card)}
    Path(folder, CARD).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _parsed(described: dict[str, Any], folder: Path) -> Converted:
    precision = described.pop("precision")
    image = {key: _tuple(value) for key, value in described.pop("image").items()}
    text = TextSpec(**described.pop("text"))
    if text.tokenizer is not None and Path(folder, tokenizer.FILE).is_file():
        text = replace(text, tokenizer=str(folder))
    return Converted(ModelCard(image=ImageSpec(**image), text=text, **described), precision)


def _tuple(value: Any) -> Any:
    """A JSON list as a tuple."""
    return tuple(value) if isinstance(value, list) else value
