"""The parameters of an encoder, as a flow's YAML file gives them."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, get_args, get_type_hints

from clip_server.engine.engine import MAX_QUEUED_ITEMS
from clip_server.engine.service import Limits
from clip_server.errors import ConfigurationError
from clip_server.model_card import Precision
from clip_server.preprocess.image import MAX_PIXELS

# How each type is called in YAML.
_TYPES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
}


def _at_least(least: int, default: int) -> int:
    """A field of whole numbers from `least` on."""
    number: int = field(default=default, metadata={"least": least})
    return number


def _matching(pattern: str, allowed: str) -> str | None:
    """A field whose text, where there is one, matches a pattern. allowed: what does."""
    text: str | None = field(default=None, metadata={"pattern": pattern, "allowed": allowed})
    return text


@dataclass(frozen=True)
class EncoderParameters:
    """`uses: with:` of a flow's YAML file.

    name: of the model.
    device: `cpu`, `cuda`, `cuda:1`, with torch `mps`; None: the best available.
    jit: torch only: the towers compiled by TorchScript.
    dtype: of the weights; None: fp32, for TensorRT fp16.
    model_path: a local checkpoint, or a folder with what the runtime takes instead: for ONNX
        `visual.onnx` and `textual.onnx`.
    num_worker_preprocess: threads that tokenize and decode.
    minibatch_size: items the model takes at once.
    access_paths: which documents are encoded: `@r` those sent, `@c` their chunks, `@m` their
        matches, several as `@r,c`.
    exact: images are decoded at full size, equal to open_clip's own to the pixel.
    max_item_bytes, max_request_items, max_pixels: limits on a text or encoded image, on a
        request, and on a decoded image.
    max_queued_items: while so many are in flight, further requests are refused.
    cache_bytes: of embeddings kept to answer the same items again; 0: none.
    """

    name: str = "ViT-B-32::openai"
    device: str | None = _matching(r"cpu|mps|cuda(:\d+)?", "cpu, cuda, cuda:1 (or higher), mps")
    jit: bool = False
    dtype: str | None = _matching("|".join(get_args(Precision)), ", ".join(get_args(Precision)))
    model_path: str | None = None
    num_worker_preprocess: int = _at_least(1, 4)
    minibatch_size: int = _at_least(1, 32)
    access_paths: str = "@r"
    exact: bool = False
    max_item_bytes: int = _at_least(1, Limits.max_item_bytes)
    max_request_items: int = _at_least(1, Limits.max_request_items)
    max_pixels: int = _at_least(1, MAX_PIXELS)
    max_queued_items: int = _at_least(1, MAX_QUEUED_ITEMS)
    cache_bytes: int = _at_least(0, 0)

    @classmethod
    def names(cls) -> list[str]:
        """The keys that `uses: with:` may hold."""
        return [each.name for each in fields(cls)]

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> EncoderParameters:
        """The parameters of a YAML file. A key left empty means its default.

        Raises:
            ConfigurationError: a key is unknown, or its value has the wrong type or is not
                allowed.
        """
        values = {key: value for key, value in given.items() if value not in (None, "")}
        if "traversal_paths" in values:
            warnings.warn(
                "traversal_paths is the old name of access_paths: rename it", stacklevel=2
            )
            values.setdefault("access_paths", values.pop("traversal_paths"))
            values.pop("traversal_paths", None)
        types = get_type_hints(cls)
        for key in values.keys() - types.keys():
            raise ConfigurationError(_unknown(str(key), cls.names()))
        for each in fields(cls):
            if each.name in values:
                _check(each, types[each.name], values[each.name])
        parameters = cls(**values)
        parse_access_paths(parameters.access_paths)
        return parameters


def _unknown(key: str, known: list[str]) -> str:
    likely = difflib.get_close_matches(key, known, 1)
    meant = f"; did you mean {likely[0]!r}?" if likely else ""
    return f"unknown parameter {key!r} of CLIPEncoder{meant} (known: {', '.join(known)})"


def _check(parameter: Field[Any], annotated: Any, value: Any) -> None:
    """Raises ConfigurationError where a value does not fit its field."""
    expected = next(each for each in (*get_args(annotated), annotated) if each in _TYPES)
    least, pattern = parameter.metadata.get("least"), parameter.metadata.get("pattern")
    # A bool is an int to Python, but not to someone who writes YAML.
    fits = type(value) is expected
    if fits and (least is None or value >= least):
        if pattern is None or re.fullmatch(pattern, value):
            return
        allowed = f"one of {parameter.metadata['allowed']}"
    else:
        allowed = _TYPES[expected] + ("" if least is None else f" from {least}")
    raise ConfigurationError(f"{parameter.name}: {value!r} is not {allowed}")


def parse_access_paths(paths: str) -> list[str]:
    """`@r,c` as docarray's access paths below the documents sent: ["", "chunks"].

    Raises ConfigurationError for anything else.
    """
    fields_of = {"r": "", "c": "chunks", "m": "matches"}
    letters = paths.replace(" ", "").removeprefix("@").split(",")
    if not all(letter in fields_of for letter in letters):
        raise ConfigurationError(
            f"access_paths {paths!r}: allowed are '@r' (the documents sent), '@c' (their "
            "chunks) and '@m' (their matches), several as '@r,c'"
        )
    return [fields_of[letter] for letter in letters]
