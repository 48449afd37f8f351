"""Names an item in an error: the path, the text, or what kind of image it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# Characters of a text or path that are shown: its beginning, and its end, where paths differ.
_HEAD, _TAIL = 120, 60
# Fields of a dict or Document to show, in order of preference.
_FIELDS = ("text", "uri", "url", "image", "blob", "tensor")


def brief(raw_item: Any) -> Any:
    """Reduces an item to what `label` needs, so that no large one is kept."""
    if isinstance(raw_item, (str, os.PathLike)) or hasattr(raw_item, "embedding"):
        return raw_item
    if isinstance(raw_item, Mapping):
        unknown = "a dict" if raw_item else "an empty dict"
        return brief(next((raw_item[name] for name in _FIELDS if name in raw_item), unknown))
    return label(raw_item)


def label(raw_item: Any) -> str:
    """One line that names the item."""
    try:
        words = _words(raw_item)
    # A user's class may raise anything; its name must not fail the call.
    except Exception:
        words = type(raw_item).__name__
    if len(words) > _HEAD + _TAIL:
        words = f"{words[:_HEAD]}…{words[-_TAIL:]}"
    return " ".join(words.split())


def _words(raw_item: Any) -> str:
    if isinstance(raw_item, (str, os.PathLike)):
        return os.fsdecode(raw_item)
    if isinstance(raw_item, (bytes, bytearray, memoryview)):
        return f"{memoryview(raw_item).nbytes:,} bytes"
    name = type(raw_item).__name__
    if hasattr(raw_item, "embedding"):
        values = (getattr(raw_item, field, None) for field in (*_FIELDS, "id"))
        return f"{name} {next((each for each in values if each and isinstance(each, str)), '')}"
    if hasattr(raw_item, "shape") and hasattr(raw_item, "dtype"):
        return f"{name} of {raw_item.dtype} {tuple(raw_item.shape)}"
    if hasattr(raw_item, "mode") and hasattr(raw_item, "size"):
        return (
            getattr(raw_item, "filename", "") or f"{name} of mode {raw_item.mode} {raw_item.size}"
        )
    return f"{name} {raw_item!r}" if isinstance(raw_item, (int, float)) else name
