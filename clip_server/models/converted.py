"""A folder that a model was converted into, which is all that serving it needs:

visual.onnx, textual.onnx   the towers (or visual.pt, textual.pt: TorchScript;
                            visual.trt, textual.trt: TensorRT engines)
visual.onnx.data            the weights of a graph that is too large for one file
card.json                   the card, and the precision of the towers
tokenizer.json              where the card names a Hugging Face tokenizer
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, ModelCard, TextSpec
from clip_server.models import tokenizer, tokenizer_files

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = get_args(Tower)

CARD = "card.json"
# The towers' files, by what they were converted to.
FILES: dict[str, dict[Tower, str]] = {
    "onnx": {"image": "visual.onnx", "text": "textual.onnx"},
    "torchscript": {"image": "visual.pt", "text": "textual.pt"},
    "tensorrt": {"image": "visual.trt", "text": "textual.trt"},
}


class Converted(NamedTuple):
    """What `card.json` says: the model, and the precision of its towers, such as `fp16`."""

    card: ModelCard
    precision: str


def read(folder: str | Path) -> Converted | None:
    """What a folder holds; None where it has no `card.json`.

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


def has_towers(folder: str | Path | None, kind: str) -> bool:
    """Whether a folder holds the files of both towers. kind: as in `FILES`."""
    files = FILES[kind].values()
    return folder is not None and all(Path(folder, file).is_file() for file in files)


def check_dtype(folder: str | Path, wanted: str | None) -> str:
    """The precision of the towers in a folder, which run as they are.

    Those that nobody described, because they are a person's own, pass for fp32.

    Raises:
        ConfigurationError: another one is wanted.
    """
    described = read(folder)
    found = described.precision if described else "fp32"
    if wanted not in (None, found):
        raise ConfigurationError(
            f"dtype {wanted!r} is for checkpoints: the towers in {folder} run as they are, {found}"
        )
    return found


def refuse(folder: str | Path) -> None:
    """Raises ConfigurationError where what should be a checkpoint is a folder of converted towers:
    a runtime that has both of its own there asks for no checkpoint."""
    if read(folder) is not None:
        kinds = " or ".join(" and ".join(files.values()) for files in FILES.values())
        raise ConfigurationError(
            f"{folder} is of a converted model, without both towers for this runtime ({kinds}): "
            "convert what is missing, or take the other runtime"
        )


def write(folder: Path, card: ModelCard, precision: str) -> None:
    """Writes `card.json`, and beside it the tokenizer's files where the card names one."""
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
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
