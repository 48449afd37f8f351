"""BERT as a text tower: its dimensions, and its tensors by name.

Chinese-CLIP's text towers are of this kind, and M-CLIP's. Unlike CLIP's own, a block normalises
after it adds, every position sees every other that is no padding, and an embedding is that of
the first position or the mean over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Shapes = dict[str, tuple[int, ...]]

# What is added to the attention scores of padding.
MASKED = -10000.0


@dataclass(frozen=True)
class BertTower:
    """`text_cfg`'s `bert`.

    prefix: where its tensors are in a checkpoint.
    mlp_width: of the layer between the two of a block.
    positions: that it has embeddings of; the first token stands at `first_position`.
    types: of tokens; ours are all of the first.
    pool: what an embedding is made of: the first position, or the mean over all.
    projection: the tensor [width, dim], or the Linear with a bias, that ends the tower.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int
    positions: int = 512
    first_position: int = 0
    types: int = 2
    pad_id: int = 0
    epsilon: float = 1e-12
    pool: Literal["first", "mean"] = "first"
    prefix: str = "bert."
    projection: str = "text_projection"
    projection_bias: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> BertTower | None:
        """The tower of a configuration in open_clip's JSON form, if it is a BERT."""
        described = config["text_cfg"].get("bert")
        return described and cls(**described)

    def shapes(self, dim: int) -> Shapes:
        """The name and shape of every tensor in a checkpoint; embeddings have `dim`."""
        width, embeddings = self.width, f"{self.prefix}embeddings."
        shapes: Shapes = {
            f"{embeddings}word_embeddings.weight": (self.vocab_size, width),
            f"{embeddings}position_embeddings.weight": (self.positions, width),
            f"{embeddings}token_type_embeddings.weight": (self.types, width),
            **_vectors(f"{embeddings}LayerNorm", width),
        }
        for index in range(self.layers):
            shapes |= self._block_shapes(self.block(index))
        if self.projection_bias:
            return shapes | _linear(self.projection, width, dim)
        return shapes | {self.projection: (width, dim)}

    def block(self, index: int) -> str:
        """Where a block's tensors are."""
        return f"{self.prefix}encoder.layer.{index}."

    def attention(self, index: int) -> tuple[str, str, str]:
        """The Linear layers that make query, key and value in a block."""
        prefix = f"{self.block(index)}attention.self."
        return f"{prefix}query", f"{prefix}key", f"{prefix}value"

    def _block_shapes(self, block: str) -> Shapes:
        width = self.width
        return {
            **_linear(f"{block}attention.self.query", width, width),
            **_linear(f"{block}attention.self.key", width, width),
            **_linear(f"{block}attention.self.value", width, width),
            **_linear(f"{block}attention.output.dense", width, width),
            **_vectors(f"{block}attention.output.LayerNorm", width),
            **_linear(f"{block}intermediate.dense", width, self.mlp_width),
            **_linear(f"{block}output.dense", self.mlp_width, width),
            **_vectors(f"{block}output.LayerNorm", width),
        }


def _vectors(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
