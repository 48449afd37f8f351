"""What the encoders share: parameters, the engine, and the endpoints Jina sees."""

# Jina reads the endpoints' annotations at run time: no `from __future__ import annotations`.

import asyncio
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar

from docarray import DocList
from jina import requests
from jina.constants import __default_endpoint__

from clip_client import scores
from clip_client.proto import clip_pb2 as pb
from clip_server import runtimes
from clip_server.engine.engine import Engine, Item
from clip_server.engine.service import Limits, Service
from clip_server.errors import ConfigurationError, ItemError, RequestError
from clip_server.executors.clip_executor import ClipExecutor
from clip_server.executors.documents import ClipDoc, ClipMatch, ClipPart
from clip_server.executors.parameters import EncoderParameters, parse_access_paths
from clip_server.models import zoo
from clip_server.preprocess.image import ImageTransform
from clip_server.rpc.request_parameters import RequestParameters
from clip_server.runtimes.protocol import Runtime


class BaseCLIPEncoder(ClipExecutor):
    """Encodes documents and clip.v1 messages with the runtime that a subclass names."""

    # Its name in the registry of runtimes; None if `build_runtime` is overridden.
    runtime: ClassVar[str | None] = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        try:
            self.parameters = EncoderParameters.parse(self.own_arguments(arguments))
            runtime = self.build_runtime(self.parameters, self._threads())
        except ConfigurationError as error:
            sys.exit(f"clip_server: {error}")
        self.engine = Engine(
            runtime,
            minibatch_size=self.parameters.minibatch_size,
            num_worker_preprocess=self.parameters.num_worker_preprocess,
            transform=ImageTransform(
                runtime.card.image, self.parameters.exact, self.parameters.max_pixels
            ),
            max_queued_items=self.parameters.max_queued_items,
            cache_bytes=self.parameters.cache_bytes,
        )
        self.service = Service(
            self.engine,
            Limits(self.parameters.max_item_bytes, self.parameters.max_request_items),
        )

    @classmethod
    def prepare(cls, given: Mapping[str, Any]) -> None:
        """Finds out before any process starts whether this encoder can be built, and fetches
        its weights. Raises ConfigurationError where it cannot."""
        parameters = EncoderParameters.parse(given)
        spec = runtimes.find(cls.runtime) if cls.runtime else None
        model = parameters.name, parameters.model_path
        if spec is not None and spec.find_towers(zoo.own_path(*model)):
            zoo.resolve(*model)
        else:
            zoo.checkpoint(*model)

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> Runtime:
        """The runtime with its model loaded, using at most so many CPU threads."""
        assert cls.runtime is not None, f"{cls.__name__} names no runtime"
        return runtimes.load_runtime(
            cls.runtime,
            parameters.name,
            model_path=parameters.model_path,
            device=parameters.device,
            precision=parameters.dtype,
            threads=threads,
            options=asdict(parameters),
        )

    def _threads(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return max(1, (cores or 1) // max(1, getattr(self.runtime_args, "replicas", 1)))

    async def handle(self, request: pb.Request) -> pb.Response:
        """See ClipExecutor."""
        return await self.service.handle(request)

    @requests(on=["/", "/encode", __default_endpoint__])
    async def encode(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Sets `embedding` of each document, or `error`."""
        options = RequestParameters.parse(parameters, refuse_unknown=False)
        paths = self._access_paths(options)
        chosen = [doc for path in paths for doc in _descend(docs, path)]
        encoded = await self.engine.encode(
            [self._item(doc) for doc in chosen], minibatch_size=options.minibatch_size
        )
        embeddings = encoded.embeddings
        if options.normalize:
            embeddings = scores.normalize(embeddings)
        for index, doc in enumerate(chosen):
            doc.error = encoded.errors.get(index)
            doc.embedding = None if doc.error else embeddings[index]
            if options.drop_image_content:
                doc.blob = None
                doc.uri = None
        return docs

    def _access_paths(self, options: RequestParameters) -> list[str]:
        try:
            return parse_access_paths(options.access_paths or self.parameters.access_paths)
        except ConfigurationError as error:
            raise RequestError(f"parameters: {error}") from None

    @requests(on="/rank")
    async def rank(self, docs: DocList[ClipDoc], **_: Any) -> DocList[ClipDoc]:
        """Scores each document's matches against it and sorts them, best first."""
        await asyncio.gather(*map(self._rank_one, docs))
        return docs

    async def _rank_one(self, doc: ClipDoc) -> None:
        candidates = list(doc.matches or [])
        try:
            ranked = await self.service.rank(self._item(doc), [*map(self._item, candidates)])
        except RequestError as error:
            doc.error = str(error)
            return
        for match in ranked.matches:
            candidates[match.index].scores = {
                "clip_score": match.probability,
                "clip_score_cosine": match.cosine,
            }
        for index, why in ranked.errors.items():
            candidates[index].error = why
        order = [*(match.index for match in ranked.matches), *ranked.errors]
        doc.matches = DocList[ClipMatch](candidates[index] for index in order)

    def _item(self, doc: ClipPart) -> Item:
        if doc.text:
            return self.service.check(doc.text)
        if doc.blob:
            return self.service.check(doc.blob)
        if doc.uri:
            return self.service.to_item(pb.Item(uri=doc.uri))
        return ItemError("an empty document: it needs a text, a blob or a data: uri")

    def close(self) -> None:
        """Ends the engine's threads."""
        self.engine.close()


def _descend(docs: DocList[ClipDoc], path: str) -> list[ClipPart]:
    """All documents at the end of a path."""
    return list(docs.traverse_flat(path)) if path else list(docs)
