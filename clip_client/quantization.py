"""Embeddings in 8 bits and in 1 bit a dimension, for the client and the server alike.

int8    Each row is scaled so that its largest value is 127 or -127, and rounded. Cosines are those
        of the rows as they are, since a row's scale does not change them.
uint8   int8 plus 128. Subtract 128 before computing cosines.
ubinary A bit for each dimension, 1 where the value is above 0, the first dimension in the highest
        bit of the first byte; the last byte is filled up with 0. Compare them by Hamming distance.
binary  ubinary minus 128.

Nothing is calibrated: a row depends on its embedding alone, so rows of different requests, servers
and times belong into one index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_LARGEST = 127
_OFFSET = 128

Rows: TypeAlias = NDArray[Any]


def _int8(embeddings: Rows) -> Rows:
    largest = np.abs(embeddings).max(axis=1, keepdims=True, initial=0)
    # A row of zeros stays one.
    scale = _LARGEST / np.where(largest > 0, largest, 1)
    return np.rint(embeddings * scale).astype(np.int8)


def _uint8(embeddings: Rows) -> Rows:
    return (_int8(embeddings).astype(np.int16) + _OFFSET).astype(np.uint8)


def _ubinary(embeddings: Rows) -> Rows:
    return np.packbits(embeddings > 0, axis=1)


def _binary(embeddings: Rows) -> Rows:
    return (_ubinary(embeddings).astype(np.int16) - _OFFSET).astype(np.int8)


QUANTIZERS: dict[str, Callable[[Rows], Rows]] = {
    "int8": _int8,
    "uint8": _uint8,
    "binary": _binary,
    "ubinary": _ubinary,
}


def quantize(embeddings: NDArray[np.float32], kind: str) -> Rows:
    """Quantizes embeddings, [N, D]: to [N, D] int8 or uint8, or [N, ceil(D / 8)] of packed bits.

    kind: `int8`, `uint8`, `binary` or `ubinary`.
    """
    return QUANTIZERS[kind](embeddings)
