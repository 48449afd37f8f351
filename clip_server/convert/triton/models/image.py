"""`clip_image`: encoded images to pixels, as the model wants them."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from clip_preprocessing import PreprocessingModel
from numpy.typing import NDArray

from clip_server.errors import ItemError
from clip_server.model_card import ImageSpec
from clip_server.preprocess.image import ImageTransform


class TritonPythonModel(PreprocessingModel):
    """IMAGE, the bytes of a file [B, 1], to PIXELS, uint8 [B, 3, S, S]."""

    input = "IMAGE"

    def initialize(self, args: dict[str, Any]) -> None:
        """Prepares the transform."""
        super().initialize(args)
        self._transform = ImageTransform(ImageSpec(**self.card["image"]))

    def prepare(self, item: bytes) -> NDArray[np.uint8]:
        """Decodes, resizes and crops an image."""
        if not item:
            raise ItemError("the image is empty")
        return self._transform(item)

    def outputs(self, prepared: list[NDArray[np.uint8]]) -> list[Any]:
        """The pixels."""
        return [pb_utils.Tensor("PIXELS", np.stack(prepared))]
