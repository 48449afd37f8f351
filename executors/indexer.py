"""The indexer: stores what the encoder before it in the flow encodes, and searches it."""

# Jina reads the endpoints' annotations at run time: no `from __future__ import annotations`.

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from docarray import DocList
from docarray.typing import ID
from jina import requests

from clip_client.proto import clip_pb2 as pb
from clip_client.tags import tags_to_dict
from clip_server.errors import ConfigurationError, RequestError
from clip_server.executors.clip_executor import ClipExecutor
from clip_server.executors.documents import ClipDoc, ClipMatch
from clip_server.executors.indexer_parameters import IndexerParameters
from clip_server.rpc.search_parameters import SearchParameters
from clip_server.search.service import SearchService


class CLIPIndexer(ClipExecutor):
    """Stores and searches embeddings, as clip.v1 or as documents of Jina's clients."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        try:
            parameters = IndexerParameters.parse(self.own_arguments(arguments))
        except ConfigurationError as error:
            sys.exit(f"clip_server: {error}")
        self.service = SearchService(
            parameters.settings(),
            limit=parameters.return_k,
            threshold=parameters.score_thres,
            max_request_items=parameters.max_request_items,
        )

    async def handle(self, request: pb.Request) -> pb.Response:
        return await self.service.handle(request)

    @requests(on="/index")
    async def index(self, docs: DocList[ClipDoc], **_: Any) -> DocList[ClipDoc]:
        """Stores each document that has an embedding; sets `error` of those that cannot be."""
        good = _with_embeddings(docs)
        if good:
            items = [_item(doc) for doc in good]
            request = pb.IndexRequest(items=items, embeddings=_embeddings(good))
            for error in (await self.service.index(request)).errors:
                good[error.index].error = error.message
        return docs

    @requests(on="/search")
    async def search(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Sets the `matches` of each document that has an embedding, closest first."""
        request = SearchParameters.parse(parameters, refuse_unknown=False).to_request()
        good = _with_embeddings(docs)
        request.queries.extend(map(_query, good))
        request.embeddings = _embeddings(good)
        if good:
            response = await self.service.search(request)
            for doc, found in zip(good, response.results, strict=True):
                doc.matches = DocList[ClipMatch](_match(hit, response.metric) for hit in found.hits)
        return docs

    @requests(on="/delete")
    async def delete(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Removes the rows with the documents' ids or those in `parameters["ids"]`, or those that
        fulfil `parameters["filter"]`."""
        options = SearchParameters.parse(parameters, refuse_unknown=False)
        ids = (parameters or {}).get("ids") or ([] if options.filter else [d.id for d in docs])
        if not isinstance(ids, list | tuple) or not all(isinstance(each, str) for each in ids):
            raise RequestError("ids is a list of texts")
        request = pb.DeleteRequest(ids=ids, filter=options.filter)
        return _counted((await self.service.delete(request)).count)

    @requests(on="/count")
    async def count(self, parameters: dict[str, Any] | None = None, **_: Any) -> DocList[ClipDoc]:
        """One document whose tag `count` is the number of rows."""
        options = SearchParameters.parse(parameters, refuse_unknown=False)
        request = pb.CountRequest(filter=options.filter, target=options.target)
        return _counted((await self.service.count(request)).count)

    def close(self) -> None:
        """Closes the collection."""
        self.service.close()


def _with_embeddings(docs: DocList[ClipDoc]) -> list[ClipDoc]:
    for doc in docs:
        if doc.embedding is None and not doc.error:
            doc.error = "it has no embedding: an encoder comes before the indexer in a flow"
    return [doc for doc in docs if doc.embedding is not None]


def _embeddings(docs: Sequence[ClipDoc]) -> bytes:
    return np.array([doc.embedding for doc in docs], "<f4").tobytes()


def _item(doc: ClipDoc) -> pb.Item:
    source = doc.uri if doc.uri and not doc.uri.startswith("data:") else ""
    content = {"text": doc.text} if doc.text else {"image": b""}
    try:
        return pb.Item(**content, id=doc.id, tags=doc.tags, source=source)
    except (TypeError, ValueError):
        raise RequestError(f"the tags {repr(doc.tags)[:60]} are not JSON") from None


def _query(doc: ClipDoc) -> pb.Item:
    """The modality of a query, which is all that a search takes of its content."""
    if doc.text:
        return pb.Item(text=doc.text)
    return pb.Item(image=b"") if doc.uri or doc.blob else pb.Item()


def _match(hit: pb.Hit, metric: str) -> ClipMatch:
    scores = {metric.lower(): hit.score}
    if hit.HasField("relevance"):
        scores["relevance"] = hit.relevance
    return ClipMatch(
        id=ID(hit.id),
        text=hit.text or None,
        uri=hit.source or None,
        tags=tags_to_dict(hit.tags),
        scores=scores,
    )


def _counted(count: int) -> DocList[ClipDoc]:
    return DocList[ClipDoc]([ClipDoc(tags={"count": count})])
