"""The ids of words, most of which are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

# Words whose ids are remembered, and the characters that one may have: some 20 MB at most.
_REMEMBERED_WORDS, _REMEMBERED_LENGTH = 2**16, 32


class RememberedWords:
    """Remembers what a tokenizer makes of a word that does not depend on its neighbours: of common
    text nearly every word is known. Safe to call from several threads.

    encode: the ids of one word.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._remembered = lru_cache(_REMEMBERED_WORDS)(encode)

    def ids(self, words: Iterable[str]) -> list[int]:
        """The ids of all words, one after the other."""
        ids: list[int] = []
        for word in words:
            ids += self._remembered(word) if len(word) <= _REMEMBERED_LENGTH else self._encode(word)
        return ids
