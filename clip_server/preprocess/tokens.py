"""What every tokenizer of the server gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import TextSpec


class Tokens(NamedTuple):
    """A tokenized text.

    ids: its special tokens included; [l] int32, not padded.
    truncated: whether the text was longer than the context, so that its end is lost.
    """

    ids: NDArray[np.int32]
    truncated: bool


class Tokenizer(ABC):
    """The tokenizer of one model. Safe to call from several threads.

    spec: the model's, with the tokenizer's own padding id where it says one.
    """

    spec: TextSpec

    @abstractmethod
    def tokenize(self, text: str) -> Tokens:
        """The tokens of one text, truncated to the context length.

        Raises:
            ItemError: the text holds half of a surrogate pair, so it is not Unicode.
        """

    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids alone; see `tokenize`."""
        return self.tokenize(text).ids

    def _framed(self, start: int, ids: list[int], end: int, truncated: bool = False) -> Tokens:
        """As many ids as the context has room for, between a start and an end token.

        truncated: whether the text goes on behind these ids.
        """
        most = self.spec.context_length - 2
        framed = np.array([start, *ids[:most], end], dtype=np.int32)
        return Tokens(framed, truncated or len(ids) > most)
