"""A least-recently-used cache of embeddings."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Bytes that an entry takes in addition to its embedding: key, tuple, array object and dict slot,
# as measured.
_OVERHEAD = 386


class CachedEmbedding(NamedTuple):
    """The embedding of a text or image that was computed before.

    embedding: [D].
    truncated: whether it is of a text longer than the model's context.
    tokens: of the text that the model read; 0 of an image.
    """

    embedding: NDArray[np.float32]
    truncated: bool
    tokens: int


class EmbeddingCache:
    """Caches embeddings by the content of their text or image.

    It belongs to one engine, so to one model and one way of preprocessing.

    max_bytes: upper bound on its size; 0: caches nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._embeddings: OrderedDict[bytes, CachedEmbedding] = OrderedDict()

    def get(self, item: str | bytes) -> CachedEmbedding | None:
        """Returns the cached embedding of a text or an encoded image, if there is one."""
        if not self.max_bytes:
            return None
        key = content_key(item)
        cached = self._embeddings.get(key)
        if cached is None:
            self.misses += 1
            return None
        self.hits += 1
        self._embeddings.move_to_end(key)
        return cached

    def put(self, key: bytes, embedding: NDArray[np.float32], truncated: bool, tokens: int) -> None:
        """Stores an embedding, [D]. key: the `content_key` of its text or image.

        truncated, tokens: see `CachedEmbedding`.
        """
        size = embedding.nbytes + _OVERHEAD
        if size > self.max_bytes or key in self._embeddings:
            return
        self._embeddings[key] = CachedEmbedding(embedding.copy(), truncated, tokens)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self._embeddings.popitem(last=False)
            self.bytes -= size


def content_key(item: str | bytes) -> bytes:
    """A cryptographic hash, so that no client can construct a collision with another's item."""
    if isinstance(item, str):
        return blake2b(
            item.encode("utf-8", "surrogatepass"), digest_size=16, person=b"text"
        ).digest()
    return blake2b(item, digest_size=16, person=b"image").digest()
