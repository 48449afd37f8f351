"""Encoders of images and texts: an engine in this process, or a running server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from clip_client import Client
from clip_server.commands.console import Advance
from clip_server.engine.engine import Engine
from clip_server.preprocess.image import ImageTransform
from clip_server.runtimes.protocol import Runtime

# Items read and encoded together, which bounds the memory for files.
_CHUNK = 256


class Encoder(Protocol):
    """Embeds texts and encoded images.

    name: the runtime and precision, as shown to people. model, device: likewise.
    dim: D, the length of an embedding.
    """

    name: str
    model: str
    device: str
    dim: int

    def encode(self, items: Sequence[str | bytes]) -> tuple[NDArray[np.float32], Mapping[int, str]]:
        """Returns embeddings [N, D], and the reasons of items that failed, by their index."""
        ...

    def close(self) -> None:
        """Releases the model or the connection."""
        ...


class EngineEncoder:
    """The service's own engine over a runtime."""

    def __init__(self, name: str, runtime: Runtime, exact: bool) -> None:
        self.name, self.model, self.device = name, runtime.card.name, runtime.device
        self.dim = runtime.card.dim
        self._engine = Engine(runtime, transform=ImageTransform(runtime.card.image, exact))
        self._loop = asyncio.new_event_loop()

    def encode(self, items: Sequence[str | bytes]) -> tuple[NDArray[np.float32], Mapping[int, str]]:
        encoded = self._loop.run_until_complete(self._engine.encode(items))
        return encoded.embeddings, encoded.errors

    def close(self) -> None:
        self._engine.close()
        self._loop.close()


class ServerEncoder:
    """A running server. Raises ClipError where it does not answer."""

    def __init__(self, address: str, credential: str | None = None) -> None:
        self._client = Client(address, credential)
        info = self._client.info()
        self.name, self.model = f"server {info.runtime} {info.dtype}", info.model
        self.device, self.dim = info.device, info.dim

    def encode(self, items: Sequence[str | bytes]) -> tuple[NDArray[np.float32], Mapping[int, str]]:
        # A caption such as "cat.jpg" is a text, not a path.
        documents = [{"text": item} if isinstance(item, str) else item for item in items]
        embeddings, failures = self._client.encode(documents, on_item_error="return")
        return embeddings, {failure.index: failure.message for failure in failures}

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True)
class EmbeddingResult:
    """Embeddings of items.

    embeddings: [N, D]; NaN in the rows of items that failed.
    errors: the reasons, by index.
    """

    embeddings: NDArray[np.float32]
    errors: Mapping[int, str]


def embed(encoder: Encoder, items: Sequence[str | Path], advance: Advance) -> EmbeddingResult:
    """Embeds texts (str) and images (paths), a chunk at a time."""
    embeddings = np.full((len(items), encoder.dim), np.nan, np.float32)
    errors: dict[int, str] = {}
    for start in range(0, len(items), _CHUNK):
        chunk = items[start : start + _CHUNK]
        contents: dict[int, str | bytes] = {}
        for index, item in enumerate(chunk, start):
            try:
                contents[index] = item if isinstance(item, str) else item.read_bytes()
            except OSError as error:
                errors[index] = f"it cannot be read: {error.strerror}"
        places = list(contents)
        if places:
            embeddings[places], failed = encoder.encode(list(contents.values()))
            errors |= {places[row]: why for row, why in failed.items()}
        advance(len(chunk))
    # A model may overflow in a lower precision: that is reported, not ignored.
    for lost in np.flatnonzero(~np.isfinite(embeddings).all(axis=1)):
        errors.setdefault(int(lost), f"{encoder.name} returned an embedding that is not finite")
    embeddings[list(errors)] = np.nan
    return EmbeddingResult(embeddings, errors)
