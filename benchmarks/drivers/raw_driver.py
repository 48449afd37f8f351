"""Our runtime with no server around it, the most that one could give: `raw_driver.py MODEL PHOTOS`.

MODEL is the folder of a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from driver import Driver, Item, batches

from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.onnx import OnnxRuntime


class RawDriver(Driver):
    def __init__(self, model: str, photo_folder: str) -> None:
        super().__init__(photo_folder)
        self.runtime = OnnxRuntime.load("", model_path=model, device="cpu")
        self.tokenizer = tokenizer_for(self.runtime.card.text)
        self.transform = ImageTransform(self.runtime.card.image)
        self.decoders = ThreadPoolExecutor()

    async def encode(self, items: list[Item]) -> Any:
        return self._encode(items)

    def stream(self, items: Iterator[Item], batch: int, in_flight: int) -> int:
        del in_flight
        return sum(len(self._encode(each)) for each in batches(items, batch))

    def _encode(self, items: list[Item]) -> Any:
        if isinstance(items[0], bytes):
            pixels = list(self.decoders.map(self.transform, items))
            return self.runtime.encode_image(np.stack(pixels))
        tokens = [self.tokenizer.encode(text) for text in items]
        return self.runtime.encode_text(pad(tokens, self.tokenizer.spec))


if __name__ == "__main__":
    RawDriver(*sys.argv[1:]).serve()
