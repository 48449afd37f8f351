"""Items of requests: how many there are, ids of those that come without one, and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from clip_client.proto import clip_pb2 as pb


def content_id(content: str | bytes) -> str:
    """A hash of a text or image, so that the same content is one row of a collection."""
    data = content.encode() if isinstance(content, str) else content
    return f"sha256-{hashlib.sha256(data).hexdigest()[:40]}"


def count_items(request: pb.Request) -> int | None:
    """The items that a request is about; None: it is not about items, as one for information."""
    kind = request.WhichOneof("body")
    if kind in ("encode", "index"):
        return len(getattr(request, kind).items)
    if kind == "search":
        return len(request.search.queries)
    return 1 if kind == "rank" else None


def item_errors(errors: Mapping[int, str]) -> list[pb.ItemError]:
    """Messages by the index of their items, in that order."""
    return [pb.ItemError(index=index, message=errors[index]) for index in sorted(errors)]
