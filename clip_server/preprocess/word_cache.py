"""The ids of words, most of which are looked up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

# Words whose ids are remembered, and the characters that one may have: some 20 MB at most.
_REMEMBERED_WORDS, _REMEMBERED_LENGTH = 2**16, 32


class RememberedWords:
    """Remembers what a tokenizer makes of a word that does not depend on its neighbours: of common
    text nearly every word is known. Safe to call from several threads.

    encode: the ids of one word.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._remembered: dict[str, list[int]] = {}

    def ids(self, words: Sequence[str]) -> list[int]:
        """The ids of all words, one after the other."""
        try:  # that all are known, without a step of Python's for each
            return list(chain.from_iterable(map(self._remembered.__getitem__, words)))
        except KeyError:
            return list(chain.from_iterable(map(self._ids_of_one, words)))

    def _ids_of_one(self, word: str) -> list[int]:
        ids = self._remembered.get(word)
        if ids is None:
            ids = self._encode(word)
            if len(word) <= _REMEMBERED_LENGTH:
                if len(self._remembered) >= _REMEMBERED_WORDS:
                    self._remembered.clear()  # what is common is soon back
                self._remembered[word] = ids
        return ids
