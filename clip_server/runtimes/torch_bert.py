"""BERT as a text tower in torch (see `towers.bert`), without the transformers library."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from clip_server.towers.bert import BertText


class BertTextTower(nn.Module):
    """Tokens [B, L] to embeddings [B, D].

    tensors: a checkpoint that has `tower.shapes(D)`.
    """

    positions: Tensor

    def __init__(self, tower: BertText, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._pad_id, self._pool = tower.pad_id, tower.pool
        prefix = f"{tower.prefix}embeddings."
        words = tensors[f"{prefix}word_embeddings.weight"]
        self.words = nn.Embedding(tower.vocab_size, tower.width, _weight=words)
        places = tensors[f"{prefix}position_embeddings.weight"][tower.first_position :]
        # Every token is of the first type.
        kind = tensors[f"{prefix}token_type_embeddings.weight"][0]
        self.register_buffer("positions", places.float() + kind)
        self.norm = nn.LayerNorm(tower.width, tower.epsilon)
        self.norm.load_state_dict(affine(tensors, f"{prefix}LayerNorm", ""))
        self.blocks = nn.ModuleList(_block(tower, index, tensors) for index in range(tower.layers))
        self.projection = _projection(tower, tensors)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == self._pad_id
        states = self.norm(self.words(tokens) + self.positions[: tokens.shape[1]])
        for block in self.blocks:
            states = block(states, src_key_padding_mask=padding)
        embeddings: Tensor = self.projection(self._pooled(states, padding))
        return embeddings

    def _pooled(self, states: Tensor, padding: Tensor) -> Tensor:
        """[B, L, W] to [B, W]."""
        if self._pool == "first":
            return states[:, 0]
        present = (~padding).unsqueeze(-1).to(states.dtype)
        return (states * present).sum(1) / present.sum(1)


def _block(tower: BertText, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A block of the checkpoint: torch's own is the same, by other names."""
    with torch.device("meta"):
        block = nn.TransformerEncoderLayer(
            tower.width,
            tower.heads,
            tower.mlp_width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=tower.epsilon,
            batch_first=True,
        )
    prefix, names = tower.block(index), tower.attention(index)
    state = {
        "self_attn.in_proj_weight": torch.cat([tensors[f"{name}.weight"] for name in names]),
        "self_attn.in_proj_bias": torch.cat([tensors[f"{name}.bias"] for name in names]),
        **affine(tensors, f"{prefix}attention.output.dense", "self_attn.out_proj."),
        **affine(tensors, f"{prefix}attention.output.LayerNorm", "norm1."),
        **affine(tensors, f"{prefix}intermediate.dense", "linear1."),
        **affine(tensors, f"{prefix}output.dense", "linear2."),
        **affine(tensors, f"{prefix}output.LayerNorm", "norm2."),
    }
    block.load_state_dict(state, assign=True)
    return block


def affine(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """The weight and the bias of a layer, by our prefix instead of the checkpoint's name."""
    return {f"{ours}{part}": tensors[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _projection(tower: BertText, tensors: Mapping[str, Tensor]) -> nn.Module:
    if tower.projection_mlp:
        first, second = (_linear(tensors[name]) for name in tower.projection_layers)
        return nn.Sequential(first, nn.GELU(), second)
    if tower.projection_bias:
        return _linear(*(tensors[f"{tower.projection}.{part}"] for part in ("weight", "bias")))
    return _linear(tensors[tower.projection].T)


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    dim, width = weight.shape
    linear = nn.Linear(width, dim, bias=bias is not None, device="meta")
    state = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias})
    linear.load_state_dict(state, assign=True)
    return linear
