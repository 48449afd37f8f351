"""The dimensions of an architecture, read from its configuration or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from clip_server.towers.bert import BertTower

Shapes = Mapping[str, tuple[int, ...]]

# What a configuration of CLIP's own towers says; with anything more, shapes do not tell all.
_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_POSITIONS = {"visual.positional_embedding", "visual.attnpool.positional_embedding"}
# Where a text tower has its words, its positions and its blocks.
_TEXT_TOWERS = (
    ("token_embedding.weight", "positional_embedding", "transformer.resblocks."),
    (
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.encoder.layer.",
    ),
)
_STAGES = ("visual.layer1.", "visual.layer2.", "visual.layer3.", "visual.layer4.")


class Text(NamedTuple):
    """What they say of the text tower; `context` is how many positions have an embedding."""

    context: int
    vocabulary: int
    width: int
    layers: int


class Dimensions(NamedTuple):
    """What the shapes of a checkpoint's tensors say of CLIP's own towers, or of its image tower
    and a BERT.

    vision_layers: blocks of a transformer, or of each of a residual network's four stages.
    patch: pixels of a side; 0 in a residual network.
    positions: of the image tower's positional embedding, its class token included.
    """

    dim: int
    vision_width: int
    vision_layers: tuple[int, ...]
    patch: int
    positions: int
    text: Text


def of_config(config: Mapping[str, Any]) -> Dimensions | None:
    """The dimensions of open_clip's JSON form; None where its towers are not CLIP's own."""
    vision, text = config["vision_cfg"], _text_of_config(config)
    if config.get("custom_text") or vision.keys() - _VISION or text is None:
        return None
    layers, residual = vision.get("layers", 12), isinstance(vision.get("layers"), list)
    patch = 32 if residual else vision.get("patch_size", 16)
    return Dimensions(
        dim=config["embed_dim"],
        vision_width=vision.get("width", 768),
        vision_layers=tuple(layers) if residual else (layers,),
        patch=0 if residual else patch,
        positions=(vision.get("image_size", 224) // patch) ** 2 + 1,
        text=text,
    )


def _text_of_config(config: Mapping[str, Any]) -> Text | None:
    if bert := BertTower.of(config):
        return Text(bert.positions, bert.vocab_size, bert.width, bert.layers)
    text = config["text_cfg"]
    if text.keys() - _TEXT:
        return None
    return Text(
        context=text.get("context_length", 77),
        vocabulary=text.get("vocab_size", 49408),
        width=text.get("width", 512),
        layers=text.get("layers", 12),
    )


def of_tensors(shapes: Shapes) -> Dimensions | None:
    """The dimensions of a checkpoint; None where its towers are not CLIP's own."""
    position, text = next((name for name in _POSITIONS if name in shapes), None), _text(shapes)
    if position is None or text is None or "text_projection" not in shapes:
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
        text=text,
    )


def _text(shapes: Shapes) -> Text | None:
    for words, positions, blocks in _TEXT_TOWERS:
        if words in shapes and positions in shapes:
            vocabulary, width = shapes[words]
            return Text(shapes[positions][0], vocabulary, width, _count(shapes, blocks))
    return None


def _count(shapes: Shapes, prefix: str) -> int:
    """How many numbered modules there are below a prefix."""
    return len(
        {name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)}
    )
