"""Loads checkpoints and normalises pixels, for every runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec, ModelCard
from clip_server.models import weights, zoo

# Prefixes of the tensors that come with an image tower.
_OF_IMAGE = ("logit_scale", "visual.")


def load_checkpoint(
    name: str, model_path: str | Path | None = None
) -> tuple[ModelCard, weights.CheckpointTensors]:
    """The card of a model and every tensor of its checkpoint, not yet checked.

    name: a canonical name or an alias.
    model_path: a `.safetensors` file, or a folder with `open_clip_model.safetensors`.

    Raises:
        UnknownModelError, WeightsError: as `zoo.resolve`, `zoo.checkpoint`, `weights.read`.
    """
    card, path = zoo.resolve(name, model_path), zoo.checkpoint(name, model_path)
    image = path if card.image_of is None else zoo.checkpoint(card.image_of)
    # The checkpoint's own logit scale and bias, not the defaults of its card.
    bias = None if card.logit_bias is None else weights.read_logit_bias(image)
    card = replace(card, logit_scale=weights.read_logit_scale(image), logit_bias=bias)
    tensors = weights.read(path)
    if image != path:
        tensors = tensors.replaced(weights.read(image), _OF_IMAGE)
    return card, tensors


def normalized(pixels: NDArray[np.uint8], image: ImageSpec) -> NDArray[np.float32]:
    """Normalises pixels 0..255, for towers that do not do it themselves."""
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (image.mean, image.std))
    values = (pixels.astype(np.float32) / 255 - mean) / std
    return values.astype(np.float32, copy=False)
