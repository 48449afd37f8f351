"""The interface of all tokenizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import TextSpec


class Tokens(NamedTuple):
    """A tokenized text.

    ids: [l] int32, including special tokens, not padded.
    truncated: whether the text was longer than the context, so that its end was dropped.
    """

    ids: NDArray[np.int32]
    truncated: bool


class Tokenizer(ABC):
    """The tokenizer of one model. Safe to call from several threads.

    spec: the model's text settings, with the padding id of the tokenizer if it defines one.
    """

    spec: TextSpec

    @abstractmethod
    def tokenize(self, text: str) -> Tokens:
        """Tokenizes one text, truncated to the context length.

        Raises:
            ItemError: the text holds half of a surrogate pair, so it is not valid Unicode.
        """

    def encode(self, text: str) -> NDArray[np.int32]:
        """Returns the ids alone, [l] int32; see `tokenize`."""
        return self.tokenize(text).ids

    def _with_special_tokens(
        self, start: int, ids: list[int], end: int, truncated: bool = False
    ) -> Tokens:
        """Puts ids, truncated to the context length, between a start and an end token.

        truncated: whether the text continues after these ids.
        """
        limit = self.spec.context_length - 2
        tokens = np.array([start, *ids[:limit], end], dtype=np.int32)
        return Tokens(tokens, truncated or len(ids) > limit)
