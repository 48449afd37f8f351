"""The encoder of NLLB, a translator between 200 languages, as a text tower: nllb-clip's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.towers.attention import Attention, slice_first
from clip_server.towers.bert import first_positions, padding_mask, present_tokens
from clip_server.towers.layout import Layout
from clip_server.towers.tower import (
    TOKENIZER_KEYS,
    Config,
    Shapes,
    Target,
    TextTower,
    linear_shapes,
    norm_shapes,
    transformer_macs,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "transformer."
_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_POSITIONS, _FIRST_POSITION = 1024, 2
_LONGEST_WAVE = 10000.0


@dataclass(frozen=True)
class Size:
    """The dimensions of an encoder."""

    layers: int
    mlp_width: int
    width: int = 1024
    heads: int = 16
    vocab_size: int = 256206


# By the names of transformers' models.
SIZES = {
    "facebook/nllb-200-distilled-600M": Size(12, 4096),
    "facebook/nllb-200-distilled-1.3B": Size(24, 8192),
}


@dataclass(frozen=True)
class NllbText(TextTower):
    """hub: the repository with the configuration that torch needs."""

    size: Size
    hub: str | None

    keys = (
        TOKENIZER_KEYS
        | {"context_length", "vocab_size"}
        | {
            *("hf_model_name", "hf_pooler_type", "hf_proj_type"),
        }
    )
    # Computed, but saved by some releases.
    unused = (f"{_PREFIX}embed_positions.",)
    trim = "masked"
    pad_id = 1

    @property
    def max_length(self) -> int:
        return _POSITIONS

    @classmethod
    def from_config(cls, config: Config) -> NllbText | None:
        text = config["text_cfg"]
        name = text.get("hf_model_name", "")
        end = text.get("hf_pooler_type"), text.get("hf_proj_type")
        if not text.keys() <= cls.keys or name not in SIZES or end != ("cls_pooler", "linear"):
            return None
        return cls(SIZES[name], hub=name)

    def shapes(self, dim: int) -> Shapes:
        size = self.size
        shapes: Shapes = {
            f"{_PREFIX}embed_tokens.weight": (size.vocab_size, size.width),
            **norm_shapes(f"{_PREFIX}layer_norm", size.width),
            "proj.weight": (dim, size.width),
        }
        for index in range(size.layers):
            block = _block(index)
            for name in (*_attention(block), f"{block}self_attn.out_proj"):
                shapes |= linear_shapes(name, size.width, size.width)
            shapes |= linear_shapes(f"{block}fc1", size.width, size.mlp_width)
            shapes |= linear_shapes(f"{block}fc2", size.mlp_width, size.width)
            shapes |= {**norm_shapes(block + _NORMS[0], size.width)}
            shapes |= {**norm_shapes(block + _NORMS[1], size.width)}
        return shapes

    def macs(self, dim: int, length: int) -> int:
        size = self.size
        blocks = transformer_macs(size.width, size.mlp_width, size.layers, length)
        return blocks + size.width * dim

    def build(self, graph: GraphBuilder, target: Target) -> str:
        del target  # the same graph for all
        width = self.size.width
        length = graph.op("Shape", "tokens", name="length", start=1, end=2)
        mask = padding_mask(graph, present_tokens(graph, self.pad_id))
        table = graph.weight(f"{_PREFIX}embed_tokens.weight") * np.float32(width**0.5)
        words = graph.lookup(f"{_PREFIX}embed_tokens", table, "tokens")
        positions = graph.floats("positions", self._positions())
        positions = slice_first(graph, positions, length, axes=[0])
        states = graph.op("Add", words, positions, name="tokens.placed")
        states = graph.op("Reshape", states, graph.integers(-1, width), name="tokens.flat")
        layout = Layout(length)
        for index in range(self.size.layers - 1):
            states = self._build_block(graph, _block(index), states, layout, mask)
        last = Layout(length, lambda rows: first_positions(graph, rows, length, width))
        states = self._build_block(graph, _block(self.size.layers - 1), states, last, mask)
        states = graph.layer_norm(states, f"{_PREFIX}layer_norm")
        return graph.product(states, "proj", graph.weight("proj.weight").T)

    def _positions(self) -> NDArray[np.float32]:
        """The waves of every position, [P, W]."""
        half = self.size.width // 2
        steps = np.arange(half, dtype=np.float32) * np.float32(np.log(_LONGEST_WAVE) / (half - 1))
        places = np.arange(_FIRST_POSITION, _FIRST_POSITION + _POSITIONS, dtype=np.float32)
        angles = places[:, np.newaxis] * np.exp(-steps)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    def _build_block(
        self, graph: GraphBuilder, block: str, states: str, layout: Layout, mask: str
    ) -> str:
        """One block: states [B * L, W] to the same, or only to the first positions, [B, W]."""
        normed = graph.layer_norm(states, block + _NORMS[0])
        name, heads = f"{block}self_attn", self.size.heads
        attention = Attention.of_linears(graph, name, heads, _attention(block))
        if layout.pool is not None:
            query, key, value = attention.project_pooled(layout.pool(normed), normed, layout)
            states = layout.pool(states)
        else:
            query, key, value = attention.project_all(normed, layout)
        attended = attention.attend(query, key, value, mask)
        attended = graph.stored_linear(attended, f"{name}.out_proj")
        states = graph.op("Add", states, attended, name=f"{block}attended")
        hidden = graph.layer_norm(states, block + _NORMS[1])
        hidden = graph.stored_linear(hidden, f"{block}fc1")
        hidden = graph.op("Relu", hidden, name=f"{block}relu")
        hidden = graph.stored_linear(hidden, f"{block}fc2")
        return graph.op("Add", states, hidden, name=f"{block}states")


def _block(index: int) -> str:
    return f"{_PREFIX}layers.{index}."


def _attention(block: str) -> list[str]:
    """The Linear layers for query, key and value in a block."""
    return [f"{block}self_attn.{letter}_proj" for letter in "qkv"]
