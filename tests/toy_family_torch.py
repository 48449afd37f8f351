"""The toy family in torch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from toy_family import PROJECTION, TABLE, BagOfWords


class TorchBagOfWords(nn.Module):
    """Tokens [B, L] to embeddings [B, D]."""

    def __init__(self, tower: BagOfWords, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._pad_id = tower.pad_id
        self.table, self.projection = (nn.Parameter(tensors[name]) for name in (TABLE, PROJECTION))

    def forward(self, tokens: Tensor) -> Tensor:
        present = (tokens != self._pad_id).unsqueeze(-1)
        mean = (self.table[tokens.long()] * present).sum(1) / present.sum(1)
        return mean @ self.projection
