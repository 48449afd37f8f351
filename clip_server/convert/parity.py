"""How near a converted tower is to its source, on seeded inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.scores import normalize
from clip_server.model_card import ModelCard, Precision
from clip_server.models.converted import Tower

# What every item's cosine has to reach.
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.99}
_IMAGES, _TEXTS = 4, 8


@dataclass(frozen=True)
class Parity:
    """What a tower gives, beside what its source gives.

    cosine: the least of any item's two vectors.
    difference: the greatest of any number, as a share of the source's greatest.
    """

    cosine: float
    difference: float

    @classmethod
    def of(cls, found: NDArray[np.float32], expected: NDArray[np.float32]) -> Parity:
        """found, expected: the same items' embeddings, [B, D]."""
        largest = np.abs(expected).max()
        units = (normalize(rows.astype(np.float64)) for rows in (found, expected))
        cosines = np.multiply(*units).sum(axis=1)
        return cls(float(cosines.min()), float(np.abs(found - expected).max() / largest))

    def suffices(self, precision: Precision) -> bool:
        """Whether it is as near as its precision allows."""
        return self.cosine >= LEAST_COSINE[precision]


def samples(card: ModelCard, tower: Tower) -> NDArray[Any]:
    """Random pixels [B, 3, S, S] uint8, or texts [B, L] int32; the same each time."""
    rng = np.random.default_rng(0)
    if tower == "image":
        size = card.image.size
        return rng.integers(0, 256, (_IMAGES, 3, size, size), dtype=np.uint8)
    text = card.text
    tokens = np.full((_TEXTS, text.context_length), text.pad_id, dtype=np.int32)
    # The last two ids of CLIP's vocabulary are the start and the end token.
    end = text.vocab_size - 1
    lengths = np.linspace(3, text.context_length, _TEXTS).astype(int)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(text.pad_id + 1, end - 1, length)
        row[0], row[length - 1] = end - 1, end
    return tokens
