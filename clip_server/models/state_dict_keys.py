"""Translates the tensor names of Hugging Face's transformers to open_clip's (for CLIP's own towers)
or cn_clip's (for BERT)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_server.towers import registry

# Reads one tensor.
Loader: TypeAlias = Callable[[], NDArray[Any]]

# Only checkpoints of transformers have tensors with this prefix, and all of them do.
_SAVED_BY_TRANSFORMERS = "vision_model."
# open_clip's prefix of a text tower that is separate from the model.
_TEXT = "text."
_QUERY = re.compile(r"\.attn\.q_proj\.(weight|bias)$")


def to_open_clip_keys(tensors: Mapping[str, Loader]) -> dict[str, Loader]:
    """The tensors that towers use, by the towers' names for them, which they may have already."""
    if any(name.startswith(_SAVED_BY_TRANSFORMERS) for name in tensors):
        renamed = (_renamed(name, load) for name, load in tensors.items())
        tensors = _with_fused_projections(dict(renamed))
    return {name: load for name, load in tensors.items() if is_used(name)}


def without_text_prefix(name: str) -> str:
    """A tensor's name without the prefix of a separate text tower, which towers here lack."""
    return name.removeprefix(_TEXT)


def is_used(name: str) -> bool:
    """Whether a tensor may be one that a tower uses."""
    return not any(name.startswith(family.unused) for family in registry.families())


def _renamed(name: str, load: Loader) -> tuple[str, Loader]:
    saved = [family.saved for family in registry.families() if family.saved]
    for each in saved:
        if name in each.transposed:
            return each.transposed[name], lambda: np.ascontiguousarray(load().T)
    prefixes = {old: new for each in saved for old, new in each.prefixes.items()}
    prefix = max(filter(name.startswith, prefixes), key=len, default="")
    name = prefixes.get(prefix, "") + name.removeprefix(prefix)
    for old, new in {old: new for each in saved for old, new in each.parts.items()}.items():
        name = name.replace(old, new)
    return name, load


def _with_fused_projections(tensors: dict[str, Loader]) -> dict[str, Loader]:
    """Joins query, key and value of each block into one tensor."""
    for name in [name for name in tensors if _QUERY.search(name)]:
        parts = [tensors.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
        tensors[_QUERY.sub(r".attn.in_proj_\1", name)] = partial(_concatenated, parts)
    return tensors


def _concatenated(parts: Sequence[Loader]) -> NDArray[Any]:
    return np.concatenate([load() for load in parts])
