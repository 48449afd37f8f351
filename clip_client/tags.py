"""Tags of items, which messages hold as a Struct."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct


def tags_to_dict(tags: Struct) -> dict[str, Any]:
    """Tags as a JSON object, with whole numbers, which are floats in a Struct, as int."""
    whole: dict[str, Any] = _whole(MessageToDict(tags))
    return whole


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
