"""Matrix products in eight-bit integers: x [N, I] by W [I, O].

    x  -> uint8 about ROW_ZERO, and a scale for each row       at every call
    W  -> int8, and a scale for each column                    once
    x W = (integers of x - ROW_ZERO) by (integers of W), times both scales

Each row has its own scale, so that an embedding does not depend on the rest of its batch, and an
outlier costs precision in its own row only.

Nothing can saturate, so every processor gives the same integers. x86 without VNNI multiplies
bytes with VPMADDUBSW, which adds two neighbouring products in 16 bits. They fit if neighbouring
weights of one sign add up to no more than 128. The usual remedy is seven-bit weights; here each
column has the finest scale that satisfies the rule, which is half a bit better.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The largest integer of a weight, and of a row about its zero.
LARGEST = 127
ROW_ZERO = 128
# Replaces the largest value of a row or column of zeros, to avoid a division by zero.
SMALLEST = 1e-30
# 255 times 128 still fits into 16 signed bits; rounding may add a half to each of the two.
_LARGEST_PAIR = 128 - 2 * 0.5


def quantized(matrix: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix [I, O] as integers, and the scale [O] by which each column is restored."""
    largest = np.abs(matrix).max(axis=0) / LARGEST
    pairs = _largest_pairs(matrix) / _LARGEST_PAIR
    scale = np.maximum(np.maximum(largest, pairs), SMALLEST).astype(np.float32)
    return np.rint(matrix / scale).astype(np.int8), scale


def _largest_pairs(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest sum of two neighbours of one sign, in each column: [O]."""
    paired = matrix[: len(matrix) // 2 * 2]
    first, second = paired[::2], paired[1::2]
    sums = np.where(first * second > 0, np.abs(first + second), 0)
    largest: NDArray[np.float32] = sums.max(axis=0, initial=0)
    return largest
