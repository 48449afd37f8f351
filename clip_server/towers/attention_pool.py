"""timm's attention pooling: a query that the model has learned, then an MLP. SigLIP and PE-Core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_server.towers.attention import attend_from
from clip_server.towers.tower import EPSILON, Activation, Shapes, linear_shapes, norm_shapes
from clip_server.towers.transformer import mlp

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_MLP = ("mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class AttentionPool:
    """prefix: of its tensors in a checkpoint."""

    prefix: str
    width: int
    heads: int
    mlp_ratio: float
    activation: Activation = "gelu"
    epsilon: float = EPSILON

    def shapes(self) -> Shapes:
        """The name and shape of every tensor."""
        width, hidden = self.width, int(self.width * self.mlp_ratio)
        shapes: Shapes = {
            "latent": (1, 1, width),
            **linear_shapes("q", width, width),
            **linear_shapes("kv", width, 2 * width),
            **linear_shapes("proj", width, width),
            **norm_shapes("norm", width),
            **linear_shapes(_MLP[0], width, hidden),
            **linear_shapes(_MLP[1], hidden, width),
        }
        return {self.prefix + name: shape for name, shape in shapes.items()}

    def macs(self, length: int) -> int:
        """Multiply-accumulates for `length` positions."""
        hidden = int(self.width * self.mlp_ratio)
        keys = 2 * length * self.width * (self.width + 1)
        return keys + self.width**2 + 2 * self.width * hidden

    def build(self, graph: GraphBuilder, states: str, length: int) -> str:
        """States [B * L, W] to one of each image, [B, W]."""
        prefix = self.prefix
        latent = graph.weight(f"{prefix}latent").reshape(-1)
        query = graph.weight(f"{prefix}q.weight") @ latent + graph.weight(f"{prefix}q.bias")
        kv = graph.weight(f"{prefix}kv.weight"), graph.weight(f"{prefix}kv.bias")
        pooled = attend_from(graph, f"{prefix}attn", query, kv, states, length, self.heads)
        pooled = graph.stored_linear(pooled, f"{prefix}proj")
        hidden = graph.layer_norm(pooled, f"{prefix}norm", self.epsilon)
        hidden = mlp(graph, hidden, prefix, _MLP, self.activation)
        return graph.op("Add", pooled, hidden, name=f"{prefix}pooled")
