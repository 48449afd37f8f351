"""timm's vision transformers: SigLIP's and SigLIP 2's, pooled by attention, and those with a class
token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from clip_server.model_card import ImageSpec
from clip_server.towers.attention_pool import AttentionPool
from clip_server.towers.layout import of_all_positions, of_first_positions
from clip_server.towers.patches import embed_patches, place_patches
from clip_server.towers.tower import (
    EPSILON,
    Activation,
    Config,
    Shapes,
    Target,
    TimmTower,
    linear_shapes,
    norm_shapes,
)
from clip_server.towers.transformer import TIMM, Transformer

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual.trunk."
_NAME = re.compile(r"vit_(\w+_patch(\d+))_(siglip|clip)_(\d+)")
_SIGLIP_EPSILON = 1e-6


class Size(NamedTuple):
    """The dimensions of a transformer."""

    width: int
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    activation: Activation = "gelu"


_BASE, _LARGE = Size(768, 12, 12), Size(1024, 24, 16)
_SO400M, _GIANT = Size(1152, 27, 16, 3.7362), Size(1536, 40, 16)
# By the part of timm's names that says it. SigLIP 2 brought an activation of its own, but not to
# the architectures that SigLIP had already.
SIZES = {
    "base_patch16": _BASE,
    "base_patch32": _BASE._replace(activation="gelu_tanh"),
    "large_patch14": _LARGE,
    "large_patch16": _LARGE,
    "so400m_patch14": _SO400M,
    "so400m_patch16": _SO400M._replace(activation="gelu_tanh"),
    "giantopt_patch16": _GIANT._replace(activation="gelu_tanh"),
}


@dataclass(frozen=True)
class TimmVisionTransformer(TimmTower):
    """patch: pixels of a patch's side. grid: patches of an image's side.

    pool: by attention; None: the tower has a class token, which a matrix projects.
    """

    blocks: Transformer
    patch: int
    grid: int
    pool: AttentionPool | None

    @classmethod
    def from_config(cls, config: Config) -> TimmVisionTransformer | None:
        trunk = cls.trunk(config)
        found = _NAME.fullmatch(trunk.name)
        if not found or found[1] not in SIZES:
            return None
        by_attention = found[3] == "siglip"
        if trunk.ending != (("map", "none") if by_attention else ("token", None)):
            return None
        size, patch = SIZES[found[1]], int(found[2])
        epsilon = _SIGLIP_EPSILON if by_attention else EPSILON
        blocks = Transformer(_PREFIX, *size, epsilon=epsilon, names=TIMM)
        pool = AttentionPool(
            f"{_PREFIX}attn_pool.",
            size.width,
            size.heads,
            size.mlp_ratio,
            size.activation,
            epsilon,
        )
        return cls(blocks, patch, int(found[4]) // patch, pool if by_attention else None)

    @property
    def _length(self) -> int:
        return self.grid**2 + (self.pool is None)

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        shapes: Shapes = {
            "patch_embed.proj.weight": (width, 3, self.patch, self.patch),
            "pos_embed": (1, self._length, width),
            **norm_shapes("norm", width),
        }
        if self.pool is None:
            shapes |= {"cls_token": (1, 1, width), **norm_shapes("norm_pre", width)}
            shapes |= linear_shapes("head", width, dim)
        else:
            shapes["patch_embed.proj.bias"] = (width,)
        pooling = {} if self.pool is None else self.pool.shapes()
        named = {_PREFIX + name: shape for name, shape in shapes.items()}
        return named | self.blocks.shapes() | pooling

    def macs(self, dim: int) -> int:
        patches = self.grid**2 * 3 * self.patch**2 * self.blocks.width
        end = self.blocks.width * dim if self.pool is None else self.pool.macs(self._length)
        return patches + self.blocks.macs(self._length) + end

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        epsilon = self.blocks.epsilon
        patches = embed_patches(graph, image, target, f"{_PREFIX}patch_embed.proj", self.grid)
        positions = graph.weight(f"{_PREFIX}pos_embed")[0]
        if self.pool is not None:
            states = place_patches(graph, patches, positions)
            states = self.blocks.build(graph, states, of_all_positions(graph, self._length))
            states = graph.layer_norm(states, f"{_PREFIX}norm", epsilon)
            return self.pool.build(graph, states, self._length)
        token = graph.weight(f"{_PREFIX}cls_token").reshape(-1)
        states = place_patches(graph, patches, positions, token)
        states = graph.layer_norm(states, f"{_PREFIX}norm_pre", epsilon)
        pooled = self.blocks.build(graph, states, of_first_positions(graph, self._length))
        pooled = graph.layer_norm(pooled, f"{_PREFIX}norm", epsilon)
        return graph.stored_linear(pooled, f"{_PREFIX}head")
