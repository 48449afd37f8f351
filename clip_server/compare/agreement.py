"""Cosines between two servers' embeddings of the same items, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ClipServerError

# The cosines of one model's embeddings in fp32, fp16 and bf16 are higher: docs/parity.md.
KEEP_FROM = 0.999
# Those of int8 weights, and of other decoding or resizing of images, are mostly between the two;
# those of another model are lower.
MEASURE_FROM = 0.99
# How far the lengths of normalized embeddings are from 1, at most, after rounding to fp16.
_LENGTH_TOLERANCE = 2e-3


class ComparisonError(ClipServerError):
    """The embeddings of the servers could not be compared."""


class Verdict(Enum):
    """What to do with an index of the other server's embeddings."""

    KEEP = "keep"
    MEASURE = "keep, but measure recall again"
    INDEX_AGAIN = "index again"


@dataclass(frozen=True)
class Agreement:
    """Cosines of one kind of items, `texts` or `images`.

    lowest_index: the place of the item with the least cosine.
    """

    kind: str
    items: int
    least: float
    median: float
    mean: float
    lowest_index: int


def agreement(kind: str, theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> Agreement:
    """Compares embeddings [N, D] row by row, without those that are NaN in either.

    Raises:
        ComparisonError: no row is left.
    """
    one, other = theirs.astype(np.float64), ours.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    # An embedding of zeros has no direction: its cosine counts as 0.
    cosines = (one * other).sum(axis=1) / np.where(lengths == 0, 1, lengths)
    compared = np.flatnonzero(~np.isnan(cosines))
    if not compared.size:
        raise ComparisonError(f"none of the {kind} has an embedding by both servers")
    values = cosines[compared]
    return Agreement(
        kind,
        len(values),
        float(values.min()),
        float(np.median(values)),
        float(values.mean()),
        int(compared[values.argmin()]),
    )


def is_normalized(embeddings: NDArray[np.float32]) -> bool:
    """Whether all rows [N, D] have length 1; those with NaN are left out."""
    lengths = np.linalg.norm(embeddings, axis=1)
    lengths = lengths[~np.isnan(lengths)]
    return bool((np.abs(lengths - 1) <= _LENGTH_TOLERANCE).all())


def verdict(agreements: Sequence[Agreement]) -> Verdict:
    """The verdict by the least cosine of all."""
    least = min(each.least for each in agreements)
    if least >= KEEP_FROM:
        return Verdict.KEEP
    return Verdict.MEASURE if least >= MEASURE_FROM else Verdict.INDEX_AGAIN
