"""Items of requests: how many there are, their ids, embeddings and errors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError


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


def items_to_encode(request: pb.Request) -> Sequence[pb.Item] | None:
    """The items whose embeddings a request needs; None: it is not about items."""
    kind = request.WhichOneof("body")
    if kind == "encode":
        return request.encode.items
    if kind == "rank":
        return [request.rank.query, *request.rank.candidates]
    if kind == "index":
        return [] if request.index.embeddings else request.index.items
    if kind == "search":
        return [] if request.search.embeddings else request.search.queries
    return None


def item_errors(errors: Mapping[int, str]) -> list[pb.ItemError]:
    """Messages by the index of their items, in that order."""
    return [pb.ItemError(index=index, message=errors[index]) for index in sorted(errors)]


def read_embeddings(embeddings: bytes, count: int, dim: int) -> NDArray[np.float32]:
    """The embeddings of a message, [count, dim] float32.

    Raises:
        RequestError: it holds more or fewer.
    """
    if len(embeddings) != 4 * count * dim:
        raise RequestError(
            f"embeddings holds {len(embeddings):,} bytes: {count:,} of {dim} dimensions "
            f"in float32 are {4 * count * dim:,}"
        )
    return np.frombuffer(embeddings, "<f4").reshape(count, dim)
