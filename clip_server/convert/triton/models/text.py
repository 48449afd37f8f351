"""`clip_text`: texts to token ids, with the tokenizer of the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from clip_preprocessing import VERSION, PreprocessingModel
from numpy.typing import NDArray

from clip_server.errors import ItemError
from clip_server.model_card import TextSpec
from clip_server.preprocess.tokenizer import FILE, pad, tokenizer_for
from clip_server.preprocess.tokens import Tokens

_SHORTEST = 8


class TritonPythonModel(PreprocessingModel):
    """TEXT, UTF-8 [B, 1], to TOKENS, int32 [B, L], and TRUNCATED, bool [B, 1]."""

    input = "TEXT"

    def initialize(self, args: dict[str, Any]) -> None:
        """Loads the tokenizer."""
        super().initialize(args)
        spec = TextSpec(**self.card["text"])
        if (VERSION / FILE).is_file():
            spec = replace(spec, tokenizer=str(VERSION))
        self._tokenizer = tokenizer_for(spec)

    def prepare(self, item: bytes) -> Tokens:
        """Tokenizes a text."""
        try:
            text = item.decode()
        except UnicodeDecodeError as error:
            raise ItemError(f"the text is not UTF-8: {error}") from None
        if not text.strip():
            raise ItemError("the text is empty")
        return self._tokenizer.tokenize(text)

    def outputs(self, prepared: list[Tokens]) -> list[Any]:
        """The ids, padded, and which texts were cut."""
        truncated = np.array([[each.truncated] for each in prepared])
        return [
            pb_utils.Tensor("TOKENS", self._pad([each.ids for each in prepared])),
            pb_utils.Tensor("TRUNCATED", truncated),
        ]

    def _pad(self, rows: list[NDArray[np.int32]]) -> NDArray[np.int32]:
        """One batch. Triton batches only requests of the same shape, so lengths are rounded up to
        powers of two, or to the context length."""
        spec = self._tokenizer.spec
        tokens, length = pad(rows, spec), _SHORTEST
        while length < tokens.shape[1]:
            length *= 2
        more = max(0, min(length, spec.context_length) - tokens.shape[1])
        return np.pad(tokens, ((0, 0), (0, more)), constant_values=spec.pad_id)
