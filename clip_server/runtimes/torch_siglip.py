"""SigLIP's image tower as transformers saves it, in torch (see `towers.siglip`), without that
library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from clip_server.runtimes.torch_bert import affine
from clip_server.towers.siglip import PREFIX, SiglipVision
from clip_server.towers.tower import Activation
from clip_server.towers.transformer import OPEN_CLIP, Transformer

_POOL = f"{PREFIX}head."


def _quick_gelu(states: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return states * torch.sigmoid(1.702 * states)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,
}


class SiglipVisionTower(nn.Module):
    """Normalised pixels [B, 3, S, S] to embeddings [B, D].

    tensors: a checkpoint that has `tower.shapes(D)`.
    """

    probe: Tensor

    def __init__(self, tower: SiglipVision, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        blocks = tower.blocks
        width, epsilon = blocks.width, blocks.epsilon
        with torch.device("meta"):
            self.patches = nn.Conv2d(3, width, tower.patch, tower.patch)
            self.positions = nn.Embedding(tower.grid**2, width)
            self.norm = nn.LayerNorm(width, epsilon)
            self.attention = nn.MultiheadAttention(width, blocks.heads, batch_first=True)
            self.pooled_norm = nn.LayerNorm(width, epsilon)
            self.widening = nn.Linear(width, blocks.mlp_width)
            self.narrowing = nn.Linear(blocks.mlp_width, width)
        first, second = OPEN_CLIP.mlp
        state = {
            **affine(tensors, f"{PREFIX}conv1", "patches."),
            "positions.weight": tensors[f"{PREFIX}positional_embedding"],
            **affine(tensors, f"{PREFIX}ln_post", "norm."),
            **_attention(tensors, f"{_POOL}attention", "attention"),
            **affine(tensors, f"{_POOL}layernorm", "pooled_norm."),
            **affine(tensors, f"{_POOL}{first}", "widening."),
            **affine(tensors, f"{_POOL}{second}", "narrowing."),
        }
        self.load_state_dict(state, assign=True)
        self.register_buffer("probe", tensors[f"{_POOL}probe"])
        self.blocks = nn.ModuleList(
            _block(blocks, index, tensors) for index in range(blocks.layers)
        )
        self.activation = _ACTIVATIONS[blocks.activation]

    def forward(self, pixels: Tensor) -> Tensor:
        states = self.patches(pixels).flatten(2).transpose(1, 2) + self.positions.weight
        for block in self.blocks:
            states = block(states)
        states = self.norm(states)
        probes = self.probe.expand(states.shape[0], -1, -1)
        pooled: Tensor = self.attention(probes, states, states, need_weights=False)[0][:, 0]
        hidden = self.activation(self.widening(self.pooled_norm(pooled)))
        embeddings: Tensor = pooled + self.narrowing(hidden)
        return embeddings


def _block(blocks: Transformer, index: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A block of the checkpoint: torch's own is the same, by other names."""
    with torch.device("meta"):
        block = nn.TransformerEncoderLayer(
            blocks.width,
            blocks.heads,
            blocks.mlp_width,
            dropout=0.0,
            activation=_ACTIVATIONS[blocks.activation],
            layer_norm_eps=blocks.epsilon,
            batch_first=True,
            norm_first=True,
        )
    prefix, names = f"{PREFIX}{OPEN_CLIP.blocks}.{index}.", OPEN_CLIP
    state = {
        **_attention(tensors, f"{prefix}attn", "self_attn"),
        **affine(tensors, f"{prefix}{names.norm_1}", "norm1."),
        **affine(tensors, f"{prefix}{names.norm_2}", "norm2."),
        **affine(tensors, f"{prefix}{names.mlp[0]}", "linear1."),
        **affine(tensors, f"{prefix}{names.mlp[1]}", "linear2."),
    }
    block.load_state_dict(state, assign=True)
    return block


def _attention(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    return {
        f"{ours}.in_proj_weight": tensors[f"{theirs}.in_proj_weight"],
        f"{ours}.in_proj_bias": tensors[f"{theirs}.in_proj_bias"],
        **affine(tensors, f"{theirs}.out_proj", f"{ours}.out_proj."),
    }
