"""Results of the Client's calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_client.errors import ItemFailure
from clip_client.proto.clip_pb2 import InfoResponse


@dataclass(frozen=True)
class Batch:
    """The argument of a callback of `encode`: the items of one request, answered or failed.

    `on_done` gets those that have an embedding; `on_error` and `on_always` get all.
    """

    # The items' places in the input.
    indices: Sequence[int]
    # [n, D] float32, NaN in the rows of items that failed; [n, 0] if no item succeeded.
    embeddings: NDArray[np.float32]
    # The items that failed, by their places in the input.
    errors: Sequence[ItemFailure]
    # Why the whole request failed, which `encode` raises as well; else None.
    exception: Exception | None = None


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


class Latency(NamedTuple):
    """One line of `profile`."""

    milliseconds: float
    # Of the line above it in the tree.
    percent: float
