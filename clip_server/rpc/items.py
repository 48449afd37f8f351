"""Items of requests: their ids, and their tags as JSON objects."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct


def content_id(content: str | bytes) -> str:
    """The id of a text or image that has none: a hash, so that the same content is one row."""
    data = content.encode() if isinstance(content, str) else content
    return f"sha256-{hashlib.sha256(data).hexdigest()[:40]}"


def tags_to_dict(tags: Struct) -> dict[str, Any]:
    """Tags as a JSON object, with whole numbers, which are floats in a Struct, as int."""
    whole: dict[str, Any] = _whole(MessageToDict(tags))
    return whole


def _whole(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
