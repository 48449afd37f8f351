"""How near a converted tower is to its source, on seeded inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_client.scores import normalize
from clip_server.model_card import Precision

# What every item's cosine has to reach.
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.99}


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
