"""Jina Embeddings' addition to OpenAI's API: objects with a text or an image in `input`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.apis.embeddings_request import only
from clip_server.gateway.apis.inputs import ItemReader, image_item, text_item
from clip_server.rpc.request_parameters import shown

# `bytes` and `url` are older names of `image`.
_ITEM_READERS: Mapping[str, ItemReader] = {
    "text": text_item,
    "image": image_item,
    "bytes": image_item,
    "url": image_item,
}
# Of fields that ask for several embeddings of one text, which CLIP does not have.
READERS = {"late_chunking": only(False), "return_multivector": only(False)}


def item(value: Mapping[str, Any], place: str) -> pb.Item:
    """The item in an object of `input`. Raises RequestError unless it holds exactly one."""
    given = [key for key in _ITEM_READERS if value.get(key) is not None]
    if len(given) != 1:
        names = ", ".join(_ITEM_READERS)
        raise RequestError(f"{place} is {shown(dict(value))}, which has not exactly one of {names}")
    return _ITEM_READERS[given[0]](value[given[0]], f"{place}.{given[0]}")
