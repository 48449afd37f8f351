"""JSON documents to Jina's and back, where other executors than an encoder answer.

Jina's documents hold any field on the wire, so no class of documents is needed between.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import timezone
from typing import Any

import numpy as np
from docarray.proto import (
    DictOfAnyProto,
    DocListProto,
    DocProto,
    ListOfAnyProto,
    NdArrayProto,
    NodeProto,
)
from jina.types.request.data import DataRequest

from clip_client.data_uri import is_data_uri
from clip_server.errors import RequestError
from clip_server.gateway import json_text
from clip_server.gateway.access import admitted
from clip_server.gateway.apis.entries import read_content
from clip_server.gateway.apis.json_call import JsonCall
from clip_server.gateway.jina_protocol import JinaRequestHandler

# The fields that hold documents.
_DOCUMENTS = ("chunks", "matches")
# How deep an entry may be nested: protobuf reads no message deeper than 100, four a level.
_MOST_NESTED = 20
_LARGEST_INTEGER = 2**31


async def ask_flow(jina: JinaRequestHandler, call: JsonCall) -> dict[str, Any]:
    """The answer of the flow's executors to `call`.

    Raises:
        RequestError: none answers, one failed, or documents cannot hold what is in the body.
    """
    request = DataRequest()
    header = request.header
    header.request_id = call.request_id
    header.exec_endpoint, header.target_executor = call.endpoint, call.target
    try:
        request.parameters = call.given or {}
        request.proto.data.docs.docs.extend(map(_to_document, call.entries or ()))
    except (ValueError, TypeError) as error:
        raise RequestError(f"the body cannot be sent to the executors: {error}") from None
    with admitted(len(call.entries or ())):
        response = await jina.send(request)
    answered = response.proto_with_data
    routes = [
        (
            route.executor,
            route.start_time.ToDatetime(timezone.utc).isoformat(),
            route.end_time.ToDatetime(timezone.utc).isoformat(),
        )
        for route in answered.routes
    ]
    data = [_from_document(each, call) for each in answered.data.docs.docs]
    return call.answer(data, routes, response.parameters)


def _to_document(entry: Any) -> DocProto:
    """An entry of `data` as a document; a string is a text or a `data:` URI."""
    if isinstance(entry, str):
        entry = {"uri" if is_data_uri(entry) else "text": entry}
    if not isinstance(entry, Mapping):
        raise TypeError('an entry of data is not an object like {"text": "a cat"}')
    if json_text.is_nested(entry, _MOST_NESTED):
        raise ValueError(f"an entry of data is nested more than {_MOST_NESTED} deep")
    document = DocProto()
    for name, value in entry.items():
        if value is None:
            continue  # its class has a default
        if name == "id":
            node = NodeProto(text=str(value))
        elif name in ("blob", "image") and isinstance(value, str):
            name, node = _to_image(name, value)
        elif name in _DOCUMENTS and isinstance(value, list):
            node = NodeProto(doc_array=DocListProto(docs=map(_to_document, value)))
        else:
            node = _to_node(value)
        document.data[name].CopyFrom(node)
    return document


def _to_image(name: str, value: str) -> tuple[str, NodeProto]:
    """The field of a document that holds an image, and the image."""
    item = read_content(name, value)
    if item.HasField("image"):
        return "blob", NodeProto(blob=item.image)
    return "uri", NodeProto(text=item.uri)


def _to_node(value: Any) -> NodeProto:
    if isinstance(value, dict):
        fields = {name: _to_node(each) for name, each in value.items()}
        return NodeProto(dict=DictOfAnyProto(data=fields))
    if isinstance(value, list):
        return NodeProto(list=ListOfAnyProto(data=map(_to_node, value)))
    if isinstance(value, bool):
        return NodeProto(boolean=value)
    if isinstance(value, int) and abs(value) < _LARGEST_INTEGER:
        return NodeProto(integer=value)
    if isinstance(value, (int, float)):
        return NodeProto(float=value)
    return NodeProto(text=value) if isinstance(value, str) else NodeProto()


def _from_document(document: DocProto, call: JsonCall) -> dict[str, Any]:
    fields = {name: _from_node(node, call) for name, node in document.data.items()}
    if call.parameters.encoding_format == "base64" and fields.get("embedding") is not None:
        embedding = np.asarray(fields["embedding"], "<f4")
        fields["embedding"] = base64.b64encode(embedding.tobytes()).decode()
    if isinstance(fields.get("scores"), dict):
        fields["scores"] = call.show_scores(fields["scores"])
    return fields


def _from_node(node: NodeProto, call: JsonCall) -> Any:
    kind = node.WhichOneof("content")
    value: Any = getattr(node, kind) if kind else None
    if kind == "doc":
        return _from_document(value, call)
    if kind == "doc_array":
        return [_from_document(each, call) for each in value.docs]
    if kind in ("list", "set", "tuple"):
        return [_from_node(each, call) for each in value.data]
    if kind == "dict":
        return {name: _from_node(each, call) for name, each in value.data.items()}
    if kind == "ndarray":
        return _from_array(value)
    if kind == "blob":
        return base64.b64encode(value).decode()
    return value


def _from_array(array: NdArrayProto) -> Any:
    dense = array.dense
    return np.frombuffer(dense.buffer, dense.dtype).reshape(tuple(dense.shape))
