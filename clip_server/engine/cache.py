"""Embeddings that were computed before, the least recently used dropped first."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# What an entry takes beside its embedding: key, tuple, array object and dict slot, as measured.
_OVERHEAD = 386


class Cached(NamedTuple):
    """What is kept of an item.

    embedding: [D].
    truncated: whether it is of a text longer than the model's context.
    """

    embedding: NDArray[np.float32]
    truncated: bool


class Cache:
    """Embeddings by the content of their text or picture, for one model and one way of
    preprocessing: a cache belongs to one engine, and goes with it.

    max_bytes: what it may hold; 0: nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self.hits = self.misses = 0
        self._embeddings: OrderedDict[bytes, Cached] = OrderedDict()

    def get(self, item: str | bytes) -> Cached | None:
        """What is kept of a text or an encoded picture, if it is here."""
        if not self.max_bytes:
            return None
        key = _key(item)
        known = self._embeddings.get(key)
        if known is None:
            self.misses += 1
            return None
        self.hits += 1
        self._embeddings.move_to_end(key)
        return known

    def put(self, item: str | bytes, embedding: NDArray[np.float32], truncated: bool) -> None:
        """Keeps an embedding [D]. truncated: see `Cached`."""
        size = embedding.nbytes + _OVERHEAD
        key = _key(item) if size <= self.max_bytes else b""
        if not key or key in self._embeddings:
            return
        self._embeddings[key] = Cached(embedding.copy(), truncated)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self._embeddings.popitem(last=False)
            self.bytes -= size


def _key(item: str | bytes) -> bytes:
    """A hash of the content that no one can find a second content for."""
    text = isinstance(item, str)
    content = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
    return blake2b(content, digest_size=16, person=b"text" if text else b"picture").digest()
