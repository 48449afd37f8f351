"""The matches of a search: as typed results, and in the `.matches` of Documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clip_client.documents import note_score
from clip_client.proto import clip_pb2
from clip_client.results import Match
from clip_client.tags import tags_to_dict


def ids_in(answer: clip_pb2.IndexResponse) -> list[str | None]:
    """The id of each item; None for those that failed."""
    return [each or None for each in answer.ids]


def matches_in(answer: clip_pb2.SearchResponse) -> list[list[Match] | None]:
    """The matches of each query; None for those that failed."""
    failed = {error.index for error in answer.errors}
    return [
        None if row in failed else [_match(hit, answer.metric) for hit in found.hits]
        for row, found in enumerate(answer.results)
    ]


def set_matches(document: Any, matches: Sequence[Match]) -> None:
    """Puts matches into a Document's `.matches`, as Documents if their class is known."""
    old = getattr(document, "matches", None)
    # docarray 2 names the class in the list's own; docarray 1 has but one.
    is_typed = hasattr(old, "doc_type")
    kind = old.doc_type if old is not None and is_typed else type(document)
    made = [_document(kind, match) for match in matches]
    document.matches = type(old)(made) if old is not None and is_typed else made


def _match(hit: clip_pb2.Hit, metric: str) -> Match:
    return Match(
        id=hit.id,
        score=hit.score,
        relevance=hit.relevance if hit.HasField("relevance") else None,
        modality="image" if hit.is_image else "text",
        text=hit.text,
        uri=hit.source,
        tags=tags_to_dict(hit.tags),
        metric=metric.lower(),
    )


def _document(kind: type[Any], match: Match) -> Any:
    fields = {"id": match.id, "text": match.text, "uri": match.uri, "tags": match.tags}
    known = getattr(kind, "model_fields", None) or getattr(kind, "__fields__", None) or fields
    try:
        document = kind(**{name: value for name, value in fields.items() if name in known})
    except (TypeError, ValueError):
        return match  # a class that takes other arguments
    if hasattr(document, "scores") or hasattr(document, "tags"):
        for name, value in match.scores.items():
            note_score(document, name, value)
    return document
