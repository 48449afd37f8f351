"""Requests on a flow's collection: encoded by its encoder, then answered by its indexer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

from clip_client.data_uri import has_scheme, read_data_uri
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import ConfigurationError
from clip_server.gateway.replicas import ReplicaPool
from clip_server.gateway.topology import Topology
from clip_server.rpc.errors import request_error
from clip_server.rpc.items import content_id, read_embeddings
from clip_server.rpc.probes import PROBE_IMAGE, PROBE_TEXT, comparable_precision

# Requests that an indexer answers.
KINDS = ("index", "search", "delete", "count")


class Collection:
    """The encoder and the indexer of a flow, as one.

    dim: D, the length of the encoder's embeddings.
    """

    def __init__(self, encoder: ReplicaPool, indexer: ReplicaPool, dim: int) -> None:
        self._encoder, self.indexer = encoder, indexer
        self._dim = dim

    async def open(self, info: pb.InfoResponse) -> None:
        """Opens the collection for the encoder's model.

        Raises:
            ConfigurationError: it is of another model, or cannot be opened.
        """
        probes = await self._encode([pb.Item(text=PROBE_TEXT), pb.Item(uri=PROBE_IMAGE)], 0)
        if probes.errors:
            raise ConfigurationError(f"the encoder does not encode: {probes.errors[0].message}")
        request = pb.OpenRequest(
            model=info.model,
            dim=info.dim,
            precision=comparable_precision(info.dtype),
            probes=probes.embeddings,
        )
        # A replica that was restarted has to open it, too.
        self.indexer.probe = pb.Request(open=request)
        for response in await self.indexer.send_to_each(self.indexer.probe):
            if response.HasField("error"):
                raise ConfigurationError(response.error.message)

    async def describe(self) -> pb.Collection:
        """Describes the collection."""
        response = await self.indexer.send(pb.Request(info=pb.InfoRequest()))
        return response.info.collection

    async def call(self, request: pb.Request) -> pb.Response:
        """The response to a request of `KINDS`.

        Raises:
            RequestError: the encoder or the indexer does not answer, or refuses.
        """
        kind = request.WhichOneof("body")
        if kind == "index":
            return await self._index(request)
        if kind == "search":
            return await self._search(request)
        return await self.indexer.send(request)

    async def _index(self, request: pb.Request) -> pb.Response:
        items = request.index.items
        kept = [_without_content(item) for item in items]
        encoded = await self._embeddings(items, request.index.embeddings, request.timeout)
        errors = {error.index: error for error in encoded.errors}
        good = [index for index in range(len(items)) if index not in errors]
        # Rows of those that failed are NaN.
        rows = read_embeddings(encoded.embeddings, len(items), self._dim)[good]
        stored = await self.indexer.send(
            pb.Request(
                index=pb.IndexRequest(items=[kept[i] for i in good], embeddings=rows.tobytes())
            )
        )
        if stored.HasField("error"):
            return stored
        ids = dict(zip(good, stored.index.ids, strict=True))
        refused = [
            pb.ItemError(index=good[error.index], message=error.message)
            for error in stored.index.errors
        ]
        response = pb.IndexResponse(
            ids=[ids.get(index, "") for index in range(len(items))],
            errors=[*errors.values(), *refused],
            timings=_joint(encoded.timings, stored.index.timings),
            truncated=encoded.truncated,
            embeddings=b"" if request.index.embeddings else encoded.embeddings,
        )
        return pb.Response(index=response)

    async def _search(self, request: pb.Request) -> pb.Response:
        search = request.search
        encoded = await self._embeddings(search.queries, search.embeddings, request.timeout)
        forwarded = pb.SearchRequest(
            queries=map(_query, search.queries), embeddings=encoded.embeddings
        )
        for field, value in search.ListFields():
            if field.name not in ("queries", "embeddings"):
                setattr(forwarded, field.name, value)
        response = await self.indexer.send(pb.Request(search=forwarded))
        if response.HasField("search"):
            found = response.search
            found.errors.extend(encoded.errors)
            found.truncated = encoded.truncated
            found.timings.CopyFrom(_joint(encoded.timings, found.timings))
        return response

    async def _embeddings(
        self, items: Sequence[pb.Item], given: bytes, timeout: int
    ) -> pb.EncodeResponse:
        """The embeddings of items: those given, or the encoder's."""
        if not given and items:
            return await self._encode(items, timeout)
        return pb.EncodeResponse(embeddings=given)

    async def _encode(self, items: Sequence[pb.Item], timeout: int) -> pb.EncodeResponse:
        request = pb.Request(encode=pb.EncodeRequest(items=items), timeout=timeout)
        response = await self._encoder.send(request)
        if response.HasField("error"):
            raise request_error(response.error)
        return response.encode


async def open_collection(topology: Topology) -> Collection | None:
    """The collection of a flow, opened for its first encoder; None: the flow has no indexer.

    Raises:
        ConfigurationError: as for `Collection.open`.
    """
    indexer = next((each.pool for each in topology.executors if each.is_indexer), None)
    encoder = topology.encoder()
    if indexer is None or encoder.info is None:
        return None
    collection = Collection(encoder.pool, indexer, encoder.info.dim)
    await collection.open(encoder.info)
    return collection


def _without_content(item: pb.Item) -> pb.Item:
    """The source that a collection stores with an item: its text, but not its image."""
    content = _content(item)
    source = item.source or ("" if has_scheme(item.uri) else item.uri)
    kept = pb.Item(id=item.id or source or content_id(content), source=source)
    kept.tags.CopyFrom(item.tags)
    if _is_text(content):
        kept.text = content
    else:
        kept.image = b""
    return kept


def _query(item: pb.Item) -> pb.Item:
    """What an indexer takes of a query: its modality, unknown if only its embedding is given."""
    if item.WhichOneof("content") is None:
        return pb.Item()
    return pb.Item(text="") if _is_text(_content(item)) else pb.Item(image=b"")


def _content(item: pb.Item) -> str | bytes:
    """The text or the image in an item; b"" where there is none, or it cannot be read."""
    if not item.uri:
        return item.text or item.image
    try:
        return read_data_uri(item.uri)
    except ValueError:
        return b""  # the encoder says what is wrong with it


def _is_text(content: str | bytes) -> TypeGuard[str]:
    return isinstance(content, str) and content != ""


def _joint(encoding: pb.Timings, searching: pb.Timings) -> pb.Timings:
    joint = pb.Timings()
    joint.CopyFrom(encoding)
    joint.search = searching.search
    joint.total += searching.search
    return joint
