"""Seeded inputs to try a tower with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ModelCard
from clip_server.models.converted import Tower

_IMAGES, _TEXTS = 4, 8


def samples(card: ModelCard, tower: Tower) -> NDArray[Any]:
    """Random pixels [4, 3, S, S] uint8, or texts [8, L] int32, the shortest first and the last of
    full length; the same each time."""
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
