"""The accuracy of a converted tower, compared with its source."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clip_client.scores import normalize
from clip_server.model_card import Precision

# The cosine that every item must reach.
LEAST_COSINE: dict[Precision, float] = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.99}


@dataclass(frozen=True)
class Parity:
    """The agreement of a tower's embeddings with its source's.

    cosine: the lowest of any item.
    difference: the maximum absolute error, divided by the maximum absolute value of the source.
    """

    cosine: float
    difference: float

    @classmethod
    def of(cls, found: NDArray[np.float32], expected: NDArray[np.float32]) -> Parity:
        """Compares embeddings of the same items, [B, D] each."""
        largest = np.abs(expected).max()
        units = (normalize(rows.astype(np.float64)) for rows in (found, expected))
        cosines = np.multiply(*units).sum(axis=1)
        return cls(float(cosines.min()), float(np.abs(found - expected).max() / largest))

    def suffices(self, precision: Precision) -> bool:
        """Whether it is as accurate as the precision allows."""
        return self.cosine >= LEAST_COSINE[precision]
