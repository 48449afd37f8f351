"""The dimensions of an architecture, read from its configuration or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]

# What a configuration of CLIP's own towers says; with anything more, shapes do not tell all.
_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_POSITIONS = {"visual.positional_embedding", "visual.attnpool.positional_embedding"}
_STAGES = ("visual.layer1.", "visual.layer2.", "visual.layer3.", "visual.layer4.")


class Dimensions(NamedTuple):
    """What the shapes of a checkpoint's tensors say of CLIP's own towers.

    vision_layers: blocks of a transformer, or of each of a residual network's four stages.
    patch: pixels of a side; 0 in a residual network.
    positions: of the image tower's positional embedding, its class token included.
    """

    dim: int
    vision_width: int
    vision_layers: tuple[int, ...]
    patch: int
    positions: int
    context: int
    vocabulary: int
    text_width: int
    text_layers: int


def of_config(config: Mapping[str, Any]) -> Dimensions | None:
    """The dimensions of open_clip's JSON form; None where its towers are not CLIP's own."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if config.get("custom_text") or vision.keys() - _VISION or text.keys() - _TEXT:
        return None
    layers, residual = vision.get("layers", 12), isinstance(vision.get("layers"), list)
    patch = 32 if residual else vision.get("patch_size", 16)
    return Dimensions(
        dim=config["embed_dim"],
        vision_width=vision.get("width", 768),
        vision_layers=tuple(layers) if residual else (layers,),
        patch=0 if residual else patch,
        positions=(vision.get("image_size", 224) // patch) ** 2 + 1,
        context=text.get("context_length", 77),
        vocabulary=text.get("vocab_size", 49408),
        text_width=text.get("width", 512),
        text_layers=text.get("layers", 12),
    )


def of_tensors(shapes: Shapes) -> Dimensions | None:
    """The dimensions of a checkpoint; None where its towers are not CLIP's own."""
    position = next((name for name in _POSITIONS if name in shapes), None)
    if position is None or not {"text_projection", "token_embedding.weight"} <= shapes.keys():
        return None
    residual = "attnpool" in position
    blocks = _STAGES if residual else ("visual.transformer.resblocks.",)
    convolution = shapes["visual.layer1.0.conv1.weight" if residual else "visual.conv1.weight"]
    return Dimensions(
        dim=shapes["text_projection"][1],
        vision_width=convolution[0],
        vision_layers=tuple(_count(shapes, prefix) for prefix in blocks),
        patch=0 if residual else convolution[-1],
        positions=shapes[position][0],
        context=shapes["positional_embedding"][0],
        vocabulary=shapes["token_embedding.weight"][0],
        text_width=shapes["token_embedding.weight"][1],
        text_layers=_count(shapes, "transformer.resblocks."),
    )


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    return len(
        {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    )
