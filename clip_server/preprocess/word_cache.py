"""Caches token ids per word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

# Bounds on the cache, some 20 MB: its entries, and the characters of a word.
_MAX_WORDS, _MAX_LENGTH = 2**16, 32


class WordTokenCache:
    """Caches the token ids of words that are tokenized independently of their neighbours.

    Nearly every word of common text is cached. Safe to call from several threads.

    encode: computes the ids of one word.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._cached: dict[str, list[int]] = {}

    def ids(self, words: Sequence[str]) -> list[int]:
        """Returns the ids of all words, concatenated."""
        try:  # all words at once, without a Python call for each
            return list(chain.from_iterable(map(self._cached.__getitem__, words)))
        except KeyError:
            return list(chain.from_iterable(map(self._ids_of_one, words)))

    def _ids_of_one(self, word: str) -> list[int]:
        ids = self._cached.get(word)
        if ids is None:
            ids = self._encode(word)
            if len(word) <= _MAX_LENGTH:
                if len(self._cached) >= _MAX_WORDS:
                    self._cached.clear()  # common words are soon back
                self._cached[word] = ids
        return ids
