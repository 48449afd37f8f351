"""Results of the Client's calls."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from clip_client.proto.clip_pb2 import InfoResponse


@dataclass(frozen=True)
class Ranking:
    """One candidate of `rank`."""

    # Its place among the candidates, and the candidate itself.
    index: int
    item: Any
    # softmax(logit_scale * cosine) over the candidates.
    probability: float
    cosine: float


@dataclass(frozen=True)
class Label:
    """One label of `classify`, for one image."""

    label: str
    # softmax(logit_scale * cosine) over the labels.
    probability: float
    cosine: float


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
    # The factor of the cosines before the softmax.
    logit_scale: float
    # Of the server.
    version: str
    # The server's limits: bytes per item, bytes per request, items per request.
    max_item_bytes: int
    max_request_bytes: int
    max_request_items: int

    @classmethod
    def of(cls, response: InfoResponse) -> Info:
        """The same, from the server's answer."""
        return cls(**{field.name: getattr(response, field.name) for field in fields(cls)})
