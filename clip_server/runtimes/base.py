"""The one interface between the engine and a deep-learning framework."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clip_server.models import weights, zoo
from clip_server.models.card import ModelCard


class Runtime(Protocol):
    """A loaded model.

    name: `torch`, `onnx`, ... as shown to people.
    device: where it really runs, e.g. `cpu` or `cuda:0`.
    dtype: of the weights, e.g. `fp32`.
    concurrent: whether two threads may call its methods at once, and both get on.
    """

    name: str
    device: str
    dtype: str
    concurrent: bool
    card: ModelCard

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[B, 3, S, S] RGB pixels, 0..255, to [B, D] embeddings (not normalised)."""
        ...

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """[B, L] token ids, L at most the context length, to [B, D] (not normalised)."""
        ...


def load_checkpoint(
    name: str, model_path: str | Path | None = None
) -> tuple[ModelCard, weights.Tensors]:
    """The card of a model and every tensor of its checkpoint, not yet checked.

    name: a canonical name or an alias.
    model_path: a `.safetensors` file, or a folder with `open_clip_model.safetensors`.

    Raises:
        UnknownModelError, WeightsError: as `zoo.resolve`, `zoo.checkpoint`, `weights.read`.
    """
    card, path = zoo.resolve(name, model_path), zoo.checkpoint(name, model_path)
    image = path if card.image_of is None else zoo.checkpoint(card.image_of)
    # A checkpoint knows its own logit scale better than a table does.
    card = replace(card, logit_scale=weights.read_logit_scale(image))
    tensors = weights.read(path)
    if image != path:
        tensors |= {key: each for key, each in weights.read(image).items() if _is_of_image(key)}
    return card, tensors


def _is_of_image(tensor: str) -> bool:
    return tensor == "logit_scale" or tensor.startswith("visual.")
