"""Normalises pixels 0..255 to the range that an image tower was trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder


def normalisation(image: ImageSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The scale and the offset of pixels 0..255, each [3, 1, 1]."""
    mean, std = (np.array(v, np.float64).reshape(3, 1, 1) for v in (image.mean, image.std))
    return 1 / (255 * std), -mean / std


def normalised(graph: GraphBuilder, image: ImageSpec) -> str:
    """`pixels`, uint8 [B, 3, S, S], as normalised floats."""
    scale, shift = (values.astype(np.float32) for values in normalisation(image))
    values = graph.cast("pixels", np.float32, "pixels.float")
    values = graph.op("Mul", values, graph.constant("pixels.scale", scale), name="pixels.scaled")
    values = graph.op("Add", values, graph.constant("pixels.shift", shift), name="pixels.shifted")
    return graph.as_computed(values)
