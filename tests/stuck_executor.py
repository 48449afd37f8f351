"""An encoder whose device never comes back from a batch, once, when a file named `stuck` appears in
the server's working directory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.executors.base import BaseCLIPEncoder
from clip_server.executors.parameters import EncoderParameters
from clip_server.models import zoo


class StuckRuntime:
    """See `Runtime`."""

    name, device, precision, concurrent = "stuck", "cpu", "fp32", False
    overlaps = False

    def __init__(self) -> None:
        self.card = zoo.resolve("embedded")

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self.encode_text(pixels)

    def encode_text(self, tokens: NDArray[Any]) -> NDArray[np.float32]:
        with suppress(FileNotFoundError):
            Path("stuck").unlink()
            time.sleep(3600)
        return np.ones((len(tokens), self.card.dim), np.float32)


class CLIPEncoder(BaseCLIPEncoder):
    """See the module."""

    @classmethod
    def prepare(cls, given: Mapping[str, Any]) -> None:
        """Nothing to fetch."""
        del given

    @classmethod
    def build_runtime(cls, parameters: EncoderParameters, threads: int) -> StuckRuntime:
        del parameters, threads
        return StuckRuntime()
