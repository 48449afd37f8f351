"""infinity's addition to OpenAI's API: `modality` says what the strings of `input` are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clip_server.errors import RequestError
from clip_server.gateway.apis.inputs import ItemReader, image_item, text_item
from clip_server.rpc.request_parameters import shown

_ITEM_READERS: Mapping[str, ItemReader] = {"text": text_item, "image": image_item}
# Sent by infinity's clients for what their user left out.
_UNSET = {"model": "default/not-specified", "dimensions": 0}


def item_reader(body: Mapping[str, Any]) -> ItemReader | None:
    """The reader of each entry of `input`; None: the body does not say what they are.

    Raises:
        RequestError: it asks for another modality.
    """
    modality = body.get("modality")
    if modality is None:
        return None
    if not isinstance(modality, str) or modality not in _ITEM_READERS:
        raise RequestError(
            f"modality is {shown(modality)}: the allowed are {', '.join(_ITEM_READERS)}"
        )
    return _ITEM_READERS[modality]


def without_unset(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """A body without the fields that the user of infinity's client left out."""
    if "modality" not in body and body.get("model") != _UNSET["model"]:
        return body
    return {name: value for name, value in body.items() if _UNSET.get(name) != value}
