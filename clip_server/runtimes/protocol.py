"""The one interface between the engine and a deep-learning framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ModelCard
from clip_server.models.converted import Tower
from clip_server.runtimes.reloading import Reloadable


class OutOfMemoryError(Exception):
    """The device has no memory for a batch; a smaller one may fit."""


class Runtime(Protocol):
    """A loaded model.

    name: `torch`, `onnx`, ... as shown to people.
    device: that it runs on, such as `cpu` or `cuda:0`.
    precision: of the weights, such as `fp32`.
    concurrent: whether two threads may call its methods concurrently, and both make progress.
    overlaps: for those that are concurrent, whether the next full batch may be passed while one is
        computed, because its copy to the device overlaps with that.
    """

    name: str
    device: str
    precision: str
    concurrent: bool
    overlaps: bool
    card: ModelCard

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised).

        Raises:
            OutOfMemoryError: the device has no memory for this batch.
        """
        ...

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised).

        Raises:
            OutOfMemoryError: the device has no memory for this batch.
        """
        ...


@runtime_checkable
class UnloadingRuntime(Runtime, Protocol):
    """A runtime whose towers can be unloaded and loaded again."""

    @property
    def towers(self) -> Mapping[Tower, Reloadable[Any]]:
        """Both towers."""
        ...
