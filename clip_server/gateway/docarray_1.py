"""Jina requests with the documents of docarray 1, as clip-as-service's client sends them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from docarray import DocList
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from jina.proto import jina_pb2
from jina.types.request.data import DataRequest
from numpy.typing import NDArray

from clip_server.errors import RequestError
from clip_server.gateway import docarray_1_pb2 as pb
from clip_server.gateway.documents import FlowDoc
from clip_server.rpc.documents import ClipChunk, ClipDoc, ClipMatch
from clip_server.rpc.message_fields import refuse_many_fields

# The kinds of numbers an image may have.
_NUMBERS = "biuf"


class Docarray1Request:
    """A request in docarray 1's form."""

    def __init__(self, proto: pb.Request) -> None:
        self._proto = proto

    @classmethod
    def parse(cls, message: bytes) -> Docarray1Request | None:
        """From a serialized request; None if its documents are not docarray 1's.

        Raises:
            RequestError: it has too many fields.
        """
        refuse_many_fields(message, pb.Request.DESCRIPTOR)
        try:
            proto = pb.Request.FromString(message)
        except DecodeError:
            return None
        docs = proto.data.docs.docs
        # In docarray 2's form this field is a map, whose entries begin with their key's tag.
        is_docarray_1 = len(docs) > 0 and all(doc.id and doc.id[0] != 0x0A for doc in docs)
        return cls(proto) if is_docarray_1 else None

    @property
    def count(self) -> int:
        """The documents."""
        return len(self._proto.data.docs.docs)

    @property
    def parameters(self) -> Struct:
        """As they came."""
        return self._proto.parameters

    def to_jina(self) -> DataRequest:
        """The same request in docarray 2's form.

        Raises:
            RequestError: a document cannot be read.
        """
        proto = jina_pb2.DataRequestProto()
        try:
            proto.header.MergeFromString(self._proto.header)
            docs = DocList[ClipDoc](
                ClipDoc(
                    **_fields(doc),
                    chunks=DocList[ClipChunk](ClipChunk(**_fields(each)) for each in doc.chunks),
                    matches=DocList[ClipMatch](ClipMatch(**_fields(each)) for each in doc.matches),
                )
                for doc in self._proto.data.docs.docs
            )
        except (DecodeError, json_format.Error, ValueError, TypeError) as error:
            raise RequestError(f"the documents cannot be read: {error}") from None
        proto.parameters.CopyFrom(self.parameters)
        request = DataRequest(proto)
        request.document_array_cls = DocList[ClipDoc]
        request.data.docs = docs
        return request

    def answer(self, response: DataRequest) -> Docarray1Response:
        """The flow's answer in docarray 1's form: the documents as they came, with what is new."""
        answer = pb.Request(header=response.header.SerializeToString())
        answer.parameters.CopyFrom(self.parameters)
        answer.routes.extend(route.SerializeToString() for route in response.routes)
        if response.header.status.code != jina_pb2.StatusProto.ERROR:
            response.document_array_cls = DocList[FlowDoc]
            sent = self._proto.data.docs.docs
            answer.data.docs.docs.extend(_answered(sent, response.docs))
            if self._drops_image_content:
                for doc in answer.data.docs.docs:
                    _drop_image_content(doc)
        return Docarray1Response(response.header, answer)

    @property
    def _drops_image_content(self) -> bool:
        fields = self.parameters.fields
        return "drop_image_content" in fields and fields["drop_image_content"].bool_value


class Docarray1Response:
    """A response in docarray 1's form, with what is read of Jina's own."""

    def __init__(self, header: Any, proto: pb.Request) -> None:
        self.header = header
        self._proto = proto

    def SerializeToString(self) -> bytes:
        """The bytes of the message."""
        return self._proto.SerializeToString()


def _fields(doc: pb.Document) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: getattr(doc, name) for name in ("blob", "text", "uri", "modality")
    }
    fields = {name: value for name, value in fields.items() if value}
    fields["id"] = doc.id.decode()
    if doc.HasField("tensor"):
        fields["tensor"] = _to_numpy(doc.tensor)
    if doc.HasField("tags"):
        fields["tags"] = json_format.MessageToDict(doc.tags)
    return fields


def _to_numpy(array: pb.Array) -> NDArray[Any]:
    dtype = np.dtype(array.dense.dtype)
    if dtype.kind not in _NUMBERS:
        raise ValueError(f"a tensor of {dtype} is no image")
    return np.frombuffer(array.dense.buffer, dtype).reshape(tuple(array.dense.shape))


def _answered(sent: Sequence[pb.Document], docs: Iterable[Any]) -> list[pb.Document]:
    """The documents sent, in the order of those of the answer, with what these have more."""
    by_id = {doc.id: doc for doc in sent}
    answered = []
    for found in docs:
        doc = pb.Document(id=str(found.id).encode())
        doc.CopyFrom(by_id.get(doc.id, doc))
        _update(doc, found)
        answered.append(doc)
    return answered


def _update(doc: pb.Document, found: Any) -> None:
    fields = vars(found)
    if (embedding := fields.get("embedding")) is not None:
        embedding = np.asarray(embedding, "<f4")
        dense = pb.DenseArray(buffer=embedding.tobytes(), shape=embedding.shape, dtype="<f4")
        doc.embedding.CopyFrom(pb.Array(dense=dense, cls_name="numpy"))
    if error := fields.get("error"):
        doc.tags.update({"clip_error": str(error)})
    for name, score in (fields.get("scores") or {}).items():
        doc.scores[name].value = score
    for name in ("chunks", "matches"):
        below = _answered(getattr(doc, name), fields.get(name) or ())
        doc.ClearField(name)
        getattr(doc, name).extend(below)


def _drop_image_content(doc: pb.Document) -> None:
    doc.ClearField("blob")
    doc.ClearField("tensor")
    for each in (*doc.chunks, *doc.matches):
        _drop_image_content(each)
