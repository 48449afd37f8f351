"""Documents of any class, and clip.v1 requests as documents and back."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from docarray import DocList
from docarray.base_doc import AnyDoc
from docarray.utils.reduce import reduce
from google.protobuf import json_format

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.rpc.documents import ClipDoc, ClipMatch, ClipPart
from clip_server.rpc.items import item_errors


class FlowDoc(AnyDoc):
    """A document as some executor declares it; its fields are whatever was sent."""

    @classmethod
    def _get_field_annotation(cls, field: str) -> type[FlowDoc]:
        del field
        return FlowDoc

    @classmethod
    def _get_field_annotation_array(cls, field: str) -> Any:
        del field
        return DocList[FlowDoc]

    def update(self, other: Any) -> None:
        """Adds the fields of the same document from another branch of the flow.

        As docarray does, which knows only declared fields: lists are joined, documents below and
        dicts merged, and of anything else the other's is taken unless it is None.
        """
        mine = vars(self)
        for name, value in vars(other).items():
            if isinstance(value, DocList) and isinstance(mine.get(name), DocList):
                reduce(mine[name], value)
            elif isinstance(value, dict) and isinstance(mine.get(name), dict):
                mine[name].update(value)
            elif isinstance(value, list) and isinstance(mine.get(name), list):
                mine[name].extend(value)
            elif value is not None:
                mine[name] = value


_NOT_ANSWERED = "the flow's answer has no embedding for this item"


def encode_documents(request: pb.EncodeRequest) -> DocList[ClipDoc]:
    """A document for each item."""
    return DocList[ClipDoc](ClipDoc(**_fields(item)) for item in request.items)


def rank_documents(request: pb.RankRequest) -> DocList[ClipDoc]:
    """The query, with the candidates as its matches."""
    matches = DocList[ClipMatch](ClipMatch(**_fields(item)) for item in request.candidates)
    return DocList[ClipDoc]([ClipDoc(**_fields(request.query), matches=matches)])


def encode_response(
    sent: Sequence[ClipPart], answered: Sequence[Any], dim: int
) -> pb.EncodeResponse:
    """The embeddings of the answered documents, each at the place of its item.

    dim: of the embeddings, if none has one.
    """
    errors = dict.fromkeys(range(len(sent)), _NOT_ANSWERED)
    embeddings: dict[int, Any] = {}
    for index, doc in zip(_places(sent, answered), answered, strict=True):
        found = _field(doc, "embedding")
        if found is not None:
            embeddings[index] = np.asarray(found, "<f4").ravel()
            errors.pop(index, None)
        elif error := _field(doc, "error"):
            errors[index] = str(error)
    dim = next((len(each) for each in embeddings.values()), dim)
    rows = np.full((len(sent), dim), np.nan, "<f4")
    for index, embedding in embeddings.items():
        if len(embedding) == dim:
            rows[index] = embedding
        else:
            errors[index] = f"its embedding has {len(embedding)} dimensions, another's {dim}"
    return pb.EncodeResponse(
        embeddings=rows.tobytes(), count=len(sent), dim=dim, errors=item_errors(errors)
    )


def rank_response(sent: ClipDoc, answered: Sequence[Any]) -> pb.RankResponse:
    """The matches of the answered query, in their order.

    Raises:
        RequestError: the query failed, or is not in the answer.
    """
    if not answered:
        raise RequestError("the flow's answer has no document for the query", "INTERNAL")
    if error := _field(answered[0], "error"):
        raise RequestError(str(error))
    matches = _field(answered[0], "matches") or ()
    errors = dict.fromkeys(range(len(sent.matches)), "the flow's answer has no such match")
    response = pb.RankResponse()
    for index, match in zip(_places(sent.matches, matches), matches, strict=True):
        scores = _field(match, "scores") or {}
        try:
            probability, cosine = (
                float(scores[name]) for name in ("clip_score", "clip_score_cosine")
            )
        except (KeyError, TypeError, ValueError):
            errors[index] = str(_field(match, "error") or "the flow's answer has no scores for it")
            continue
        response.matches.add(index=index, probability=probability, cosine=cosine)
        errors.pop(index, None)
    response.errors.extend(item_errors(errors))
    return response


def _fields(item: pb.Item) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    kind = item.WhichOneof("content")
    if kind is not None:
        fields["blob" if kind == "image" else kind] = getattr(item, kind)
    if item.id:
        fields["id"] = item.id
    if item.HasField("tags"):
        try:
            fields["tags"] = json_format.MessageToDict(item.tags)
        except (json_format.Error, ValueError):
            raise RequestError("the tags of an item hold a number that is not finite") from None
    return fields


def _places(sent: Sequence[Any], answered: Sequence[Any]) -> list[int]:
    """Matches answered documents with those sent: by id, or in order if all ids are new.

    Raises:
        RequestError: an answered document is none of those sent.
    """
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for index, doc in enumerate(sent):
        waiting[str(doc.id)].append(index)
    places = [
        waiting[key].popleft() if waiting.get(key := str(_field(doc, "id"))) else None
        for doc in answered
    ]
    if len(sent) == len(answered) and not any(place is not None for place in places):
        return list(range(len(sent)))
    if None in places:
        raise RequestError(
            "the flow answered with other documents than those sent, so they have no place in "
            "the result: ask it over Jina's protocol or HTTP",
            "INTERNAL",
        )
    return [place for place in places if place is not None]


def _field(doc: Any, name: str) -> Any:
    return vars(doc).get(name)
