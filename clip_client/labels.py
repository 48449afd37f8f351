"""Names an item in an error: the path, the text, or what kind of image it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# Of a text or path that is shown: its beginning, and its end, where paths differ.
_HEAD, _TAIL = 120, 60
# Of a dict or Document, in this order.
_FIELDS = ("text", "uri", "url", "image", "blob", "tensor")


def brief(thing: Any) -> Any:
    """What `label` needs of an item: the item, or a few words in place of a large one."""
    if isinstance(thing, (str, os.PathLike)) or hasattr(thing, "embedding"):
        return thing
    if isinstance(thing, Mapping):
        value = next((thing[name] for name in _FIELDS if name in thing), "an empty dict")
        return brief(value)
    return label(thing)


def label(thing: Any) -> str:
    """One line that names the item."""
    try:
        words = _words(thing)
    # A class of the user's may fail in any way; what it is called must not fail the call.
    except Exception:
        words = type(thing).__name__
    if len(words) > _HEAD + _TAIL:
        words = f"{words[:_HEAD]}…{words[-_TAIL:]}"
    return " ".join(words.split())


def _words(thing: Any) -> str:
    if isinstance(thing, (str, os.PathLike)):
        return os.fsdecode(thing)
    if isinstance(thing, (bytes, bytearray, memoryview)):
        return f"{memoryview(thing).nbytes:,} bytes"
    name = type(thing).__name__
    if hasattr(thing, "embedding"):
        values = (getattr(thing, field, None) for field in (*_FIELDS, "id"))
        return f"{name} {next((each for each in values if each and isinstance(each, str)), '')}"
    if hasattr(thing, "shape") and hasattr(thing, "dtype"):
        return f"{name} of {thing.dtype} {tuple(thing.shape)}"
    if hasattr(thing, "mode") and hasattr(thing, "size"):
        return getattr(thing, "filename", "") or f"{name} of mode {thing.mode} {thing.size}"
    return f"{name} {thing!r}" if isinstance(thing, (int, float)) else name
