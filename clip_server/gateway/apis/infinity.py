"""infinity's addition to OpenAI's API: `modality` says what the strings of `input` are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.apis.embeddings import image_item, text_item
from clip_server.rpc.request_parameters import shown

_READERS: Mapping[str, Callable[[Any, str], pb.Item]] = {"text": text_item, "image": image_item}


def reader(body: Mapping[str, Any]) -> Callable[[Any, str], pb.Item] | None:
    """The reader of each entry of `input`; None: the body does not say what they are.

    Raises:
        RequestError: it asks for another modality.
    """
    modality = body.get("modality")
    if modality is None:
        return None
    if not isinstance(modality, str) or modality not in _READERS:
        raise RequestError(f"modality is {shown(modality)}: the allowed are {', '.join(_READERS)}")
    return _READERS[modality]
