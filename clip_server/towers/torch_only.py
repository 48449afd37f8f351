"""Towers that only torch builds: open_clip's others, timm's, transformers'.

The torch runtime serves them; for other runtimes `python -m clip_server.convert` exports them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, TextSpec, Trim
from clip_server.towers.tower import Config, ImageTower, Shapes, Target, TextTower

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# Keys whose value is the name of a model of timm's or transformers'.
_NAMES_OF_MODELS = ("timm_model_name", "hf_model_name")


@dataclass(frozen=True)
class TorchOnlyImage(ImageTower):
    """unknown: the keys of `vision_cfg` that no other family reads."""

    unknown: tuple[str, ...]

    keys = frozenset()

    @classmethod
    def from_config(cls, config: Config, known: frozenset[str] = frozenset()) -> TorchOnlyImage:
        """As in `Tower`. known: the keys that other families read."""
        return cls(_unknown(config["vision_cfg"], known))

    def shapes(self, dim: int) -> Shapes:
        del dim
        _refuse("vision_cfg", self.unknown)

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        del graph, image, target
        _refuse("vision_cfg", self.unknown)


@dataclass(frozen=True)
class TorchOnlyText(TextTower):
    """unknown: the keys of `text_cfg` that no other family reads."""

    unknown: tuple[str, ...]
    trim: Trim
    pad_id: int | None
    context: int
    hub: str | None

    keys = frozenset()

    @property
    def max_length(self) -> int:
        return self.context

    @classmethod
    def from_config(cls, config: Config, known: frozenset[str] = frozenset()) -> TorchOnlyText:
        """As in `Tower`. known: the keys that other families read."""
        text = config["text_cfg"]
        return cls(
            _unknown(text, known),
            trim=_trim(text),
            pad_id=text.get("pad_id"),
            hub=text.get("hf_model_name"),
            context=text.get("context_length", TextSpec.context_length),
        )

    def shapes(self, dim: int) -> Shapes:
        del dim
        _refuse("text_cfg", self.unknown)

    def build(self, graph: GraphBuilder, target: Target) -> str:
        del graph, target
        _refuse("text_cfg", self.unknown)


def _trim(text: Mapping[str, Any]) -> Trim:
    """The way in which open_clip's text tower allows texts to be trimmed; of graphs that others
    exported, their description says it."""
    if "exported" in text:
        trim: Trim = text["exported"]
        return trim
    if "hf_model_name" in text:
        return "masked"
    # CoCa's class token comes after the padding, at a fixed position.
    every_position = text.get("no_causal_mask") or text.get("embed_cls")
    at_end_token = text.get("pool_type", "argmax") in ("argmax", "eos")
    return "causal" if at_end_token and not every_position else "fixed"


def _unknown(part: Mapping[str, Any], known: frozenset[str]) -> tuple[str, ...]:
    """What no family accepts: keys, the name of a model, or the combination of all keys."""
    named = [f"{key} {part[key]!r}" for key in _NAMES_OF_MODELS if key in part]
    return tuple(named or sorted(part.keys() - known or part.keys()))


def _refuse(part: str, keys: tuple[str, ...]) -> NoReturn:
    raise ConfigurationError(
        f"the ONNX graph builder does not know {', '.join(keys)} in {part}: "
        "convert this model first (python -m clip_server.convert), or run it with torch"
    )
