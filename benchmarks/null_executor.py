"""An encoder with no model in it: what the server itself can do."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.models import zoo


class NullRuntime:
    """Ones, at once; see `Runtime` for the methods."""

    name, device, precision = "null", "cpu", "fp32"
    concurrent, overlaps = True, False

    def __init__(self, name: str) -> None:
        self.card = zoo.resolve(name)

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.ones((len(pixels), self.card.dim), np.float32)

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        return np.ones((len(tokens), self.card.dim), np.float32)


class NullEncoder(BaseCLIPEncoder):
    """Encodes with NullRuntime."""

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> NullRuntime:
        del threads
        return NullRuntime(parameters.name)
