"""The one interface between the engine and a deep-learning framework."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.model_card import ImageSpec, ModelCard, Precision
from clip_server.models import weights, zoo

log = logging.getLogger(__name__)


class Runtime(Protocol):
    """A loaded model.

    name: `torch`, `onnx`, ... as shown to people.
    device: where it really runs, e.g. `cpu` or `cuda:0`.
    dtype: of the weights, e.g. `fp32`.
    concurrent: whether two threads may call its methods at once, and both get on.
    overlaps: whether the next full batch may come while one is computed, since its copy to the
        device takes place meanwhile. For those that are concurrent.
    halved_batches: those that a GPU had no memory for, and that were computed in halves.
    """

    name: str
    device: str
    dtype: str
    concurrent: bool
    overlaps: bool
    card: ModelCard

    @property
    def halved_batches(self) -> int:
        """See above."""
        ...

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


def check_precision(wanted: str | None, known: Sequence[Precision], runtime: str) -> Precision:
    """The precision that a runtime builds a checkpoint in.

    known: what it has, the default first. runtime: its name, for people.

    Raises:
        ConfigurationError: it has not the one that is wanted.
    """
    found = next((each for each in known if each == (wanted or known[0])), None)
    if found is None:
        raise ConfigurationError(
            f"dtype {wanted!r} is not one the {runtime} runtime has: {', '.join(known)}"
        )
    return found


def normalized(pixels: NDArray[np.uint8], image: ImageSpec) -> NDArray[np.float32]:
    """Pixels 0..255 in the float range of a tower that does not normalise them itself."""
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (image.mean, image.std))
    values = (pixels.astype(np.float32) / 255 - mean) / std
    return values.astype(np.float32, copy=False)


class Halving:
    """Runs batches; one that the device has no memory for is halved, and both halves are run.

    run: a batch [B, ...] to embeddings [B, D]. refusal: what it raises for want of memory.
    count: batches that were halved.
    """

    def __init__(
        self, run: Callable[[NDArray[Any]], NDArray[np.float32]], refusal: type[Exception]
    ) -> None:
        self._run, self._refusal = run, refusal
        self.count = 0

    def __call__(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        """The embeddings of a batch; `refusal` where there is no memory for one item alone."""
        try:
            return self._run(batch)
        except self._refusal as error:
            if len(batch) == 1:
                raise
            log.warning("no memory for a batch of %d, which is halved: %s", len(batch), error)
        # Outside the handler, whose exception keeps alive what the failed attempt allocated.
        self.count += 1
        half = len(batch) // 2
        return np.concatenate([self(batch[:half]), self(batch[half:])])


def _is_of_image(tensor: str) -> bool:
    return tensor == "logit_scale" or tensor.startswith("visual.")
