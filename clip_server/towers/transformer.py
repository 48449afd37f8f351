"""The transformer blocks of CLIP's own two towers: layer norm first, then add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clip_server.errors import ConfigurationError
from clip_server.towers.attention import Attention
from clip_server.towers.layout import Layout
from clip_server.towers.tower import EPSILON, Shapes, linear_shapes, norm_shapes

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# The names of a block's parts in transformers, with ours.
TRANSFORMERS_PARTS = {
    ".self_attn.": ".attn.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


@dataclass(frozen=True)
class Transformer:
    """The blocks of a tower. prefix: of the tower's tensors in a checkpoint."""

    prefix: str
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    quick_gelu: bool

    def shapes(self) -> Shapes:
        """The name and shape of every tensor of the blocks."""
        width, hidden = self.width, int(self.width * self.mlp_ratio)
        one: Shapes = {
            **norm_shapes("ln_1", width),
            "attn.in_proj_weight": (3 * width, width),
            "attn.in_proj_bias": (3 * width,),
            **linear_shapes("attn.out_proj", width, width),
            **norm_shapes("ln_2", width),
            **linear_shapes("mlp.c_fc", width, hidden),
            **linear_shapes("mlp.c_proj", hidden, width),
        }
        return {
            self._block(index) + name: shape
            for index in range(self.layers)
            for name, shape in one.items()
        }

    def build(
        self,
        graph: GraphBuilder,
        states: str,
        layout: Layout,
        *,
        mask: str | None = None,
        pooled_mask: str | None = None,
    ) -> str:
        """All blocks: states [N, W] to those of the pooled positions, [B, W].

        The last block computes its query and its MLP for the pooled positions alone.

        mask: added to the attention scores, [L, L]; pooled_mask: to those of the pooled
            positions, [B, 1, 1, L].
        """
        for index in range(self.layers - 1):
            states = self._build_block(graph, index, states, layout, mask)
        return self._build_block(graph, self.layers - 1, states, layout, pooled_mask, pool=True)

    def _block(self, index: int) -> str:
        return f"{self.prefix}transformer.resblocks.{index}."

    def _build_block(
        self,
        graph: GraphBuilder,
        index: int,
        states: str,
        layout: Layout,
        mask: str | None,
        pool: bool = False,
    ) -> str:
        """One block: states [N, W] to the same, or only to the pooled ones, [B, W]."""
        prefix = self._block(index)
        normed = graph.layer_norm(states, f"{prefix}ln_1")
        weight = graph.weight(f"{prefix}attn.in_proj_weight")
        bias = graph.weight(f"{prefix}attn.in_proj_bias")
        attention = Attention(graph, f"{prefix}attn", self.heads, weight, bias)
        if pool:
            query, key, value = attention.project_pooled(layout.pool(normed), normed, layout)
            attended = attention.attend(query, key, value, mask)
            states = layout.pool(states)
        else:
            query, key, value = attention.project_all(normed, layout)
            attended = layout.gather(attention.attend(query, key, value, mask))
        attended = graph.stored_linear(attended, f"{prefix}attn.out_proj")
        states = graph.op("Add", states, attended, name=f"{prefix}attended")
        hidden = graph.layer_norm(states, f"{prefix}ln_2")
        hidden = graph.stored_linear(hidden, f"{prefix}mlp.c_fc")
        gelu = graph.quick_gelu if self.quick_gelu else graph.gelu
        hidden = gelu(hidden, f"{prefix}mlp.gelu")
        hidden = graph.stored_linear(hidden, f"{prefix}mlp.c_proj")
        return graph.op("Add", states, hidden, name=f"{prefix}states")


def saved_with_quick_gelu(saved: Mapping[str, Any]) -> bool:
    """Whether a tower that transformers saved has QuickGELU.

    Raises:
        ConfigurationError: it has neither that nor GELU, or a layer norm that is not CLIP's.
    """
    activation, epsilon = saved["hidden_act"], saved["layer_norm_eps"]
    if activation not in ("quick_gelu", "gelu") or epsilon != EPSILON:
        raise ConfigurationError(
            f"hidden_act {activation!r} with layer_norm_eps {epsilon} is not CLIP's: quick_gelu or "
            f"gelu, and {EPSILON:g}"
        )
    return bool(activation == "quick_gelu")
