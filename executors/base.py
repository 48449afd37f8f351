"""The base of the encoders: parameters, the engine, and the endpoints of Jina."""

# Jina reads the endpoints' annotations at run time: no `from __future__ import annotations`.

import asyncio
import logging
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from docarray import DocList
from jina import requests
from jina.constants import __default_endpoint__

from clip_client import images, scores
from clip_client.errors import InvalidInputError
from clip_client.proto import clip_pb2 as pb
from clip_server import __version__, runtimes
from clip_server.engine.engine import Engine, Item
from clip_server.engine.fetcher import Fetcher
from clip_server.engine.service import Limits, Service
from clip_server.errors import ConfigurationError, ItemError, RequestError
from clip_server.executors.clip_executor import ClipExecutor
from clip_server.executors.documents import ClipDoc
from clip_server.executors.parameters import EncoderParameters, field_paths, parse_access_paths
from clip_server.launch import jina_internals
from clip_server.launch.process_setup import return_large_blocks
from clip_server.models import zoo
from clip_server.models.fingerprint import fingerprint
from clip_server.preprocess.image import ImageTransform
from clip_server.rpc.request_parameters import RequestParameters
from clip_server.runtimes.protocol import Runtime

log = logging.getLogger(__name__)

Modality = Literal["text", "image"]


class BaseCLIPEncoder(ClipExecutor):
    """Encodes documents and clip.v1 messages with the runtime that a subclass names.

    It takes the parameters of a flow's `uses: with:`, by name or, in the order of
    `parameter_order`, by place. In Python it is an object like any other:

        encoder = CLIPEncoder("ViT-B-32::openai", device="cpu")
        await encoder.encode(DocList[ClipDoc]([ClipDoc(text="a cat")]))

    Raises:
        ConfigurationError: a parameter is unknown or has a wrong value, or the model is
            unavailable.
    """

    # A name in the registry of runtimes; None: the first that is installed.
    runtime: ClassVar[str | None] = None
    # `text` or `image`, for an encoder of one of them; None: both.
    modality: ClassVar[Modality | None] = None
    # As in clip-as-service's executors.
    parameter_order: ClassVar[tuple[str, ...]] = (
        "name", "device", "num_worker_preprocess", "minibatch_size", "access_paths", "model_path",
        "dtype",
    )  # fmt: skip

    def __init__(self, *by_place: Any, **arguments: Any) -> None:
        super().__init__(**arguments)
        given = self._named(by_place, self.own_arguments(arguments))
        try:
            self.parameters = self.read_parameters(given)
            runtime = self.build_runtime(self.parameters, self._threads())
            if self.is_served and runtime.precision in self._runtime_spec().arena_precisions:
                return_large_blocks()
            self.engine = self._engine(runtime)
        except ConfigurationError as error:
            if not self.is_served:
                raise
            sys.exit(f"clip_server: {error}")
        policy, limits = self.parameters.allow_uri, self._limits()
        fetcher = Fetcher(policy, limits.max_item_bytes) if policy else None
        self.service = Service(self.engine, limits, self.modality, fetcher)
        self.engine.metrics.set_build_info(__version__, self.fingerprint(self.parameters))

    def _engine(self, runtime: Runtime) -> Engine:
        return Engine(
            runtime,
            minibatch_size=self.parameters.minibatch_size,
            num_worker_preprocess=self.parameters.num_worker_preprocess,
            transform=ImageTransform(
                runtime.card.image, self.parameters.exact, self.parameters.max_pixels
            ),
            max_queued_items=self.parameters.max_queued_items,
            cache_bytes=self.parameters.cache_bytes,
            max_length=self.parameters.max_length or 0,
            idle_seconds=self.parameters.idle_seconds,
            timed=partial(jina_internals.time_stage, self),
        )

    @classmethod
    def fingerprint(cls, parameters: EncoderParameters) -> str:
        """The fingerprint of the weights that are served; empty for an executor of one's own that
        loads none."""
        model = parameters.name, parameters.model_path
        if own := cls._runtime_spec().own_towers(*model, parameters.dtype):
            return fingerprint(own.files.values())
        weights = zoo.find_checkpoint(*model)
        return fingerprint([weights]) if weights else ""

    @classmethod
    def prepare(cls, given: Mapping[str, Any]) -> None:
        """Checks before any process starts that this encoder can be built, downloads its weights,
        and imports what its processes share.

        Raises:
            ConfigurationError: it cannot be built.
        """
        parameters = cls.read_parameters(given)
        cls._runtime_spec().preload()
        model = parameters.name, parameters.model_path
        if cls._runtime_spec().own_towers(*model, parameters.dtype):
            zoo.resolve(*model)
        else:
            zoo.checkpoint(*model)

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> Runtime:
        """Loads the model on the runtime. threads: CPU threads that it may use."""
        return runtimes.load_runtime(
            cls._runtime_spec().name,
            parameters.name,
            model_path=parameters.model_path,
            device=parameters.device,
            precision=parameters.dtype,
            threads=threads,
            options=asdict(parameters),
        )

    @classmethod
    def read_parameters(cls, given: Mapping[str, Any]) -> EncoderParameters:
        """Reads the parameters of a flow's YAML. Raises ConfigurationError."""
        return EncoderParameters.parse(given)

    @classmethod
    def _runtime_spec(cls) -> runtimes.RuntimeSpec:
        return runtimes.find(cls.runtime) if cls.runtime else runtimes.first_installed()

    @classmethod
    def _named(cls, by_place: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        """All parameters by name. Raises TypeError, as a call in Python does."""
        if len(by_place) > len(cls.parameter_order):
            raise TypeError(
                f"{cls.__name__} takes at most {len(cls.parameter_order)} parameters by place: "
                f"{', '.join(cls.parameter_order)}"
            )
        placed = dict(zip(cls.parameter_order, by_place, strict=False))
        if twice := placed.keys() & named.keys():
            raise TypeError(f"{cls.__name__} got {', '.join(sorted(twice))} twice")
        return placed | named

    def _limits(self) -> Limits:
        return Limits(self.parameters.max_item_bytes, self.parameters.max_request_items)

    def _threads(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return max(1, (cores or 1) // max(1, getattr(self.runtime_args, "replicas", 1)))

    async def handle(self, request: pb.Request) -> pb.Response:
        answer = self.service.handle(request)
        del request  # see `Service.handle`
        response = await answer
        if response.HasField("info"):
            response.info.access_paths = self.parameters.access_paths
            response.info.aliases.extend(self.parameters.aliases)
            response.info.matryoshka_dimensions.extend(self.parameters.matryoshka_dimensions)
        return response

    @requests(on=["/", "/encode", __default_endpoint__])
    async def encode(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Sets `embedding` of each document, [D] float32, or `error`.

        parameters: `access_paths`, `minibatch_size`, `normalize` and `drop_image_content`. Others
            are ignored in a flow, where they may be meant for another executor.

        Raises:
            RequestError: a parameter is unknown or has a wrong value.
        """
        options = self._options(parameters)
        chosen = self.select(docs, self._access_paths(options))
        encoded = await self.engine.encode(
            await self._items(chosen), minibatch_size=options.minibatch_size
        )
        embeddings = encoded.embeddings
        if options.normalize:
            embeddings = scores.normalize(embeddings)
        for index, doc in enumerate(chosen):
            error = encoded.errors.get(index)
            _set_error(doc, error)
            doc.embedding = None if error else embeddings[index]
        if options.drop_image_content:
            _drop_images(chosen)
        return docs

    def select(self, docs: Iterable[Any], paths: Iterable[str]) -> list[Any]:
        """The documents at access paths, such as `chunks`, that this encoder encodes."""
        return [doc for path in paths for doc in descend(docs, path)]

    def _options(self, parameters: dict[str, Any] | None) -> RequestParameters:
        return RequestParameters.parse(parameters, refuse_unknown=not self.is_served)

    def _access_paths(self, options: RequestParameters) -> list[str]:
        try:
            if options.access_paths:
                return field_paths(options.access_paths)
            return parse_access_paths(self.parameters.access_paths)
        except ConfigurationError as error:
            raise RequestError(f"parameters: {error}") from None

    @requests(on="/rank")
    async def rank(
        self, docs: DocList[ClipDoc], parameters: dict[str, Any] | None = None, **_: Any
    ) -> DocList[ClipDoc]:
        """Scores each document's matches against it, and sorts them by descending score.

        parameters: `drop_image_content`; others as for `encode`.
        """
        options = self._options(parameters)
        await asyncio.gather(*map(self._rank_one, docs))
        if options.drop_image_content:
            _drop_images([*docs, *descend(docs, "matches")])
        return docs

    async def _rank_one(self, doc: ClipDoc) -> None:
        candidates = list(doc.matches or [])
        try:
            query, *items = await self._items([doc, *candidates])
            ranked = await self.service.rank(query, items)
        except RequestError as error:
            _set_error(doc, str(error))
            return
        for match in ranked.matches:
            candidates[match.index].scores = {
                "clip_score": match.probability,
                "clip_score_cosine": match.cosine,
            }
        for index, why in ranked.errors.items():
            _set_error(candidates[index], why)
        order = [*(match.index for match in ranked.matches), *ranked.errors]
        doc.matches = type(doc.matches)(candidates[index] for index in order)

    async def _items(self, docs: list[Any]) -> list[Item]:
        """The contents of documents, for the engine."""
        contents = map(content_of, docs)
        fetched = await self.service.fetch(value for field, value in contents if field == "uri")
        if any(getattr(doc, "tensor", None) is not None for doc in docs):
            # Packing pixels takes milliseconds, in which no other request could go on.
            return await asyncio.to_thread(lambda: [self._item(doc, fetched) for doc in docs])
        return [self._item(doc, fetched) for doc in docs]

    def _item(self, doc: Any, fetched: Mapping[str, Item]) -> Item:
        field, value = content_of(doc)
        if not field:
            return ItemError("an empty document: it needs a text, a blob, a tensor or a data: uri")
        if field == "tensor":
            return self.from_tensor(np.asarray(value))
        if field == "uri":
            return self.service.to_item(pb.Item(uri=value), fetched)
        return self.service.check(value)

    def from_tensor(self, tensor: np.ndarray[Any, Any]) -> Item:
        """The image in an array, as `clip_client` sends it; an ItemError if it is none."""
        try:
            return self.service.check(images.encode(images.of_array(tensor)))
        except InvalidInputError as error:
            return ItemError(str(error))

    def is_stuck(self, seconds: float) -> bool:
        return self.engine.is_stuck(seconds)

    def close(self) -> None:
        """Ends the engine's threads."""
        self.engine.close()


def descend(docs: Iterable[Any], path: str) -> list[Any]:
    """The documents in the field `path` of others; "": these themselves."""
    return [below for doc in docs for below in getattr(doc, path, None) or ()] if path else [*docs]


def content_of(doc: Any) -> tuple[str, Any]:
    """The field that holds a document's content, and its value; "" and None if none does."""
    for field in ("text", "blob", "tensor", "uri"):
        value = getattr(doc, field, None)
        if value is not None and (field == "tensor" or value):
            return field, value
    return "", None


def _drop_images(docs: Iterable[Any]) -> None:
    for doc in docs:
        for name in ("blob", "uri", "tensor"):
            if getattr(doc, name, None) is not None:
                setattr(doc, name, None)


def _set_error(doc: Any, error: str | None) -> None:
    if hasattr(doc, "error"):
        doc.error = error
    elif error:  # a class of the caller's own
        log.warning("a document has no embedding: %s", error)
