"""The names of a checkpoint's tensors: those of Hugging Face's CLIPModel and ChineseCLIPModel in
open_clip's and cn_clip's own terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Beginnings, of which the first that fits is replaced.
_PLACES = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.": "bert.",
}
# Parts of a block.
_PARTS = {
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
# Stored as [outputs, inputs], and in our terms as [inputs, outputs].
_PROJECTIONS = {
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}
_QUERY = re.compile(r"\.attn\.q_proj\.(weight|bias)$")
# BERT's own pooling, which no text tower uses, in Chinese-CLIP's checkpoints and in M-CLIP's.
_UNUSED = ("bert.pooler.", "transformer.pooler.")


def standard(tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The tensors of a checkpoint by open_clip's names, or by cn_clip's; in these it may be
    already."""
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = _fused({_renamed(name): _turned(name, tensors[name]) for name in tensors})
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_UNUSED)}


def _renamed(name: str) -> str:
    if name in _PROJECTIONS:
        return _PROJECTIONS[name]
    place = next((place for place in _PLACES if name.startswith(place)), "")
    name = _PLACES.get(place, "") + name.removeprefix(place)
    for theirs, ours in _PARTS.items():
        name = name.replace(theirs, ours)
    return name


def _turned(name: str, tensor: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.T) if name in _PROJECTIONS else tensor


def _fused(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """With query, key and value of each block in one tensor."""
    for name in [name for name in tensors if _QUERY.search(name)]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        tensors[_QUERY.sub(r".attn.in_proj_\1", name)] = np.concatenate(parts)
    return tensors
