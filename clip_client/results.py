"""Results of the Client's calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from clip_client.proto import clip_pb2
from clip_client.proto.clip_pb2 import InfoResponse
from clip_client.scores import logit_bias_of


@dataclass(frozen=True)
class Ranking:
    """One candidate of `rank`."""

    # Its place among the candidates, and the candidate itself.
    index: int
    item: Any
    # softmax(logit_scale * cosine) over the candidates. Of models with a logit bias:
    # sigmoid(logit_scale * cosine + logit_bias), of each candidate by itself.
    probability: float
    cosine: float


@dataclass(frozen=True)
class Label:
    """One label of `classify`, for one image."""

    label: str
    # As in `Ranking`, over the labels.
    probability: float
    cosine: float


@dataclass(frozen=True)
class Match:
    """One match of `search`."""

    id: str
    # The cosine or the inner product; with the metric `l2` the distance, smaller is closer.
    score: float
    # From 0 to 1: how far the score stands out from those of the collection's other rows. None
    # while the collection is too small to say.
    relevance: float | None
    # `text` or `image`.
    modality: str
    # The text of a text, and where the item came from, such as a path; '' if there is none.
    text: str
    uri: str
    tags: Mapping[str, Any]
    # `cosine`, `ip` or `l2`.
    metric: str

    @property
    def scores(self) -> dict[str, float]:
        """The score by the name of its metric, and the relevance if there is one."""
        found = {self.metric: self.score}
        return found if self.relevance is None else {**found, "relevance": self.relevance}


@dataclass(frozen=True)
class Collection:
    """The server's collection."""

    # `local` or `milvus`.
    engine: str
    rows: int
    # Rows that the approximate index holds; the others are searched exactly.
    indexed: int
    dim: int
    model: str
    # COSINE, IP or L2.
    metric: str
    # As it is in use: Flat, IVF1024, HNSW32.
    index_method: str

    @classmethod
    def of(cls, message: clip_pb2.Collection) -> Collection:
        """The same, from the server's answer."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class Info:
    """The server's model and limits. `dataclasses.asdict` makes a dict of it, for JSON."""

    model: str
    # `onnx`, `torch` or `tensorrt`, where and in which precision.
    runtime: str
    device: str
    dtype: str
    # D, the length of an embedding.
    dim: int
    # The model's input: pixels of an image's side, and tokens of a text.
    image_size: int
    context_length: int
    # The factor of the cosines before the softmax or sigmoid.
    logit_scale: float
    # Of the server.
    version: str
    # The server's limits: bytes per item, bytes per request, items per request.
    max_item_bytes: int
    max_request_bytes: int
    max_request_items: int
    # Added to the scaled cosines of models with a sigmoid in place of the softmax; else None.
    logit_bias: float | None = None
    # Of a flow with an indexer; else None.
    collection: Collection | None = None

    @classmethod
    def of(cls, response: InfoResponse) -> Info:
        """The same, from the server's answer."""
        values = {field.name: getattr(response, field.name) for field in fields(cls)}
        held = response.collection if response.HasField("collection") else None
        values["logit_bias"] = logit_bias_of(response)
        values["collection"] = held and Collection.of(held)
        return cls(**values)
