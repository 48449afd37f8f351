"""timm's Eva: the image towers of EVA and EVA-02, and of Meta's Perception Encoder (PE-Core).

They differ from `timm_vit` in their blocks: positions that rotate queries and keys, an MLP with a
gate, or a layer norm after each step instead of before it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec
from clip_server.towers.attention import Attention
from clip_server.towers.attention_pool import AttentionPool
from clip_server.towers.layout import Layout, of_all_positions, of_first_positions
from clip_server.towers.patches import embed_patches, place_patches
from clip_server.towers.tower import (
    EPSILON,
    Config,
    Shapes,
    Target,
    TimmTower,
    linear_shapes,
    norm_shapes,
    transformer_macs,
)
from clip_server.towers.transformer import TIMM, mlp

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual.trunk."
# The trunk's name, the side of a patch, and that of an image.
_NAME = re.compile(r"((?:eva|eva02|vit_pe_core)_\w+_patch(\d+)(?:_clip)?)_(\d+)")
_EVA_EPSILON = 1e-6
# The lowest frequency of rotations is about one in this many positions.
_TEMPERATURE = 10000.0


@dataclass(frozen=True)
class Rotation:
    """How positions rotate queries and keys.

    grid: patches of a side with which the tower was trained; positions in another are scaled.
    offset: added to positions.
    across_first: whether the first frequencies are of the horizontal position.
    """

    grid: int
    offset: float = 0.0
    across_first: bool = False

    def angles(self, grid: int, width: int) -> NDArray[np.float32]:
        """The angle of each pair of values, at each of grid * grid patches: [N, width / 2]."""
        count = width // 4
        exponents = np.arange(count, dtype=np.float32) / np.float32(count)
        bands = np.float32(1) / np.float32(_TEMPERATURE) ** exponents
        steps = np.arange(grid, dtype=np.float32) + np.float32(self.offset)
        steps = steps / np.float32(grid) * np.float32(self.grid)
        down, across = np.meshgrid(steps, steps, indexing="ij")
        first, second = (across, down) if self.across_first else (down, across)
        angles = [axis.reshape(-1, 1) * bands for axis in (first, second)]
        return np.concatenate(angles, axis=1)


@dataclass(frozen=True)
class Style:
    """What distinguishes a family of trunks.

    rotation: None: positions are only added.
    fused: whether query, key and value are one Linear. key_bias: whether the key has a bias.
    gated: whether the MLP has a gate, and layer norms inside it and after attention.
    norm_after: whether layer norms follow attention and MLP instead of preceding them.
    pools: whether attention pools all positions, after a layer norm before the blocks.
    """

    rotation: Rotation | None = None
    fused: bool = True
    key_bias: bool = False
    gated: bool = False
    norm_after: bool = False
    pools: bool = False


@dataclass(frozen=True)
class Size:
    """The dimensions of a trunk. class_token: whether it has one."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    style: Style
    class_token: bool = True


_EVA = Style()
_EVA_02 = Style(rotation=Rotation(16), fused=False, gated=True)


def _perception(grid: int, offset: float = 1.0) -> Style:
    rotation = Rotation(grid, offset=offset, across_first=True)
    return Style(rotation, key_bias=True, pools=True)


# By timm's names without the size of the image.
SIZES = {
    "eva_giant_patch14": Size(1408, 40, 16, 6144, _EVA),
    "eva02_base_patch16_clip": Size(768, 12, 12, 2048, _EVA_02),
    "eva02_large_patch14_clip": Size(1024, 24, 16, 2730, _EVA_02),
    "eva02_enormous_patch14_clip": Size(1792, 64, 16, 15360, Style(norm_after=True)),
    "vit_pe_core_tiny_patch16": Size(192, 12, 3, 768, _perception(24)),
    "vit_pe_core_small_patch16": Size(384, 12, 6, 1536, _perception(24)),
    "vit_pe_core_base_patch16": Size(768, 12, 12, 3072, _perception(14)),
    "vit_pe_core_large_patch14": Size(1024, 24, 16, 4096, _perception(24)),
    "vit_pe_core_gigantic_patch14": Size(1536, 50, 16, 8960, _perception(32, 0.0), False),
}


@dataclass(frozen=True)
class Eva(TimmTower):
    """patch: pixels of a patch's side. grid: patches of an image's side."""

    size: Size
    patch: int
    grid: int

    @classmethod
    def from_config(cls, config: Config) -> Eva | None:
        trunk = cls.trunk(config)
        found = _NAME.fullmatch(trunk.name)
        if not found or found[1] not in SIZES:
            return None
        size, patch = SIZES[found[1]], int(found[2])
        pool = "map" if size.style.pools else "token"
        if trunk.ending != (pool, None):
            return None
        return cls(size, patch, int(found[3]) // patch)

    @property
    def _length(self) -> int:
        return self.grid**2 + self.size.class_token

    @property
    def _epsilon(self) -> float:
        return EPSILON if self.size.style.pools else _EVA_EPSILON

    @property
    def _pool(self) -> AttentionPool:
        return AttentionPool(f"{_PREFIX}attn_pool.", self.size.width, heads=8, mlp_ratio=4.0)

    def shapes(self, dim: int) -> Shapes:
        width, style = self.size.width, self.size.style
        shapes: Shapes = {
            "patch_embed.proj.weight": (width, 3, self.patch, self.patch),
            "pos_embed": (1, self._length, width),
            **norm_shapes("norm", width),
            **linear_shapes("head", width, dim),
        }
        if self.size.class_token:
            shapes["cls_token"] = (1, 1, width)
        shapes |= norm_shapes("norm_pre", width) if style.pools else {}
        shapes |= {} if style.pools else {"patch_embed.proj.bias": (width,)}
        for index in range(self.size.layers):
            block = f"blocks.{index}."
            shapes |= {block + name: shape for name, shape in self._block_shapes().items()}
        pooling = self._pool.shapes() if style.pools else {}
        return {_PREFIX + name: shape for name, shape in shapes.items()} | pooling

    def _block_shapes(self) -> Shapes:
        width, hidden, style = self.size.width, self.size.mlp_width, self.size.style
        shapes: Shapes = {
            **norm_shapes("norm1", width),
            **norm_shapes("norm2", width),
            **linear_shapes("attn.proj", width, width),
            **linear_shapes("mlp.fc2", hidden, width),
        }
        if not style.fused:
            shapes |= linear_shapes("attn.q_proj", width, width)
            shapes |= linear_shapes("attn.v_proj", width, width)
            shapes["attn.k_proj.weight"] = (width, width)
        elif style.key_bias:
            shapes |= linear_shapes("attn.qkv", width, 3 * width)
        else:
            shapes["attn.qkv.weight"] = (3 * width, width)
            shapes |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        if not style.gated:
            return shapes | linear_shapes("mlp.fc1", width, hidden)
        shapes |= linear_shapes("mlp.fc1_g", width, hidden)
        shapes |= linear_shapes("mlp.fc1_x", width, hidden)
        return shapes | norm_shapes("mlp.norm", hidden) | norm_shapes("attn.norm", width)

    def macs(self, dim: int) -> int:
        size, length = self.size, self._length
        patches = self.grid**2 * 3 * self.patch**2 * size.width
        blocks = transformer_macs(size.width, size.mlp_width, size.layers, length)
        gates = size.layers * length * size.width * size.mlp_width if size.style.gated else 0
        pooling = self._pool.macs(length) if size.style.pools else 0
        return patches + blocks + gates + pooling + size.width * dim

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        size, length = self.size, self._length
        patches = embed_patches(graph, image, target, f"{_PREFIX}patch_embed.proj", self.grid)
        token = graph.weight(f"{_PREFIX}cls_token").reshape(-1) if size.class_token else None
        states = place_patches(graph, patches, graph.weight(f"{_PREFIX}pos_embed")[0], token)
        if size.style.pools:
            states = graph.layer_norm(states, f"{_PREFIX}norm_pre", self._epsilon)
        layout = of_all_positions(graph, length)
        for index in range(size.layers - 1):
            states = self._build_block(graph, index, states, layout)
        last = layout if size.style.pools else of_first_positions(graph, length)
        states = self._build_block(graph, size.layers - 1, states, last)
        states = graph.layer_norm(states, f"{_PREFIX}norm", self._epsilon)
        if size.style.pools:
            states = self._pool.build(graph, states, length)
        return graph.stored_linear(states, f"{_PREFIX}head")

    def _build_block(self, graph: GraphBuilder, index: int, states: str, layout: Layout) -> str:
        """One block: states [B * L, W] to the same, or only to those of class tokens, [B, W]."""
        prefix, style = f"{_PREFIX}blocks.{index}.", self.size.style
        source = states if style.norm_after else self._norm(graph, states, f"{prefix}norm1")
        weight, bias = self._projections(graph, f"{prefix}attn.")
        attention = Attention(graph, f"{prefix}attn", self.size.heads, weight, bias)
        if layout.pool is not None:
            pooled = layout.pool(source)
            query, key, value = attention.project_pooled(pooled, source, layout)
            states = pooled if style.norm_after else layout.pool(states)
        else:
            query, key, value = attention.project_all(source, layout)
            query = self._rotated(graph, query)
        attended = attention.attend(query, self._rotated(graph, key), value, None)
        if style.gated:
            attended = self._norm(graph, attended, f"{prefix}attn.norm")
        attended = graph.stored_linear(attended, f"{prefix}attn.proj")
        if style.norm_after:
            attended = self._norm(graph, attended, f"{prefix}norm1")
        states = graph.op("Add", states, attended, name=f"{prefix}attended")
        hidden = states if style.norm_after else self._norm(graph, states, f"{prefix}norm2")
        hidden = (self._gated_mlp if style.gated else _mlp)(graph, hidden, prefix)
        if style.norm_after:
            hidden = self._norm(graph, hidden, f"{prefix}norm2")
        return graph.op("Add", states, hidden, name=f"{prefix}states")

    def _norm(self, graph: GraphBuilder, states: str, name: str) -> str:
        return graph.layer_norm(states, name, self._epsilon)

    def _projections(
        self, graph: GraphBuilder, prefix: str
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight [3 W, W] and bias [3 W] of query, key and value.

        Where they are rotated, the values of each head of queries and keys are in another order,
        all first ones of the pairs before all second ones, which changes no product of the two.
        """
        width, style = self.size.width, self.size.style
        no_bias = np.zeros(width, np.float32)
        if not style.fused:
            names = [f"{prefix}{letter}_proj" for letter in "qkv"]
            weights = [graph.weight(f"{name}.weight") for name in names]
            q_bias, v_bias = graph.weight(f"{names[0]}.bias"), graph.weight(f"{names[2]}.bias")
            biases = [q_bias, no_bias, v_bias]
        else:
            weights = np.split(graph.weight(f"{prefix}qkv.weight"), 3)
            if style.key_bias:
                biases = np.split(graph.weight(f"{prefix}qkv.bias"), 3)
            else:
                biases = [graph.weight(f"{prefix}q_bias"), no_bias, graph.weight(f"{prefix}v_bias")]
        if style.rotation is not None:
            order = self._pairs_apart()
            weights = [weights[0][order], weights[1][order], weights[2]]
            biases = [biases[0][order], biases[1][order], biases[2]]
        return np.concatenate(weights), np.concatenate(biases)

    def _pairs_apart(self) -> NDArray[np.int64]:
        """The order of values, of each head the even ones first: [W]."""
        places = np.arange(self.size.width).reshape(self.size.heads, -1)
        return np.concatenate([places[:, ::2], places[:, 1::2]], axis=1).reshape(-1)

    def _rotated(self, graph: GraphBuilder, values: str) -> str:
        """Queries or keys [B, H, L, d], rotated by their positions; class tokens stay."""
        rotation, size = self.size.style.rotation, self.size
        if rotation is None:
            return values
        angles = rotation.angles(self.grid, size.width // size.heads)
        angles = np.pad(angles, ((int(size.class_token), 0), (0, 0)))
        cosines, sines = np.cos(angles), np.sin(angles)
        cosine = graph.floats("rotation.cosine", np.concatenate([cosines, cosines], axis=1))
        sine = graph.floats("rotation.sine", np.concatenate([-sines, sines], axis=1))
        first, second = graph.split(values, ("first", "second"), axis=3)
        swapped = graph.op("Concat", second, first, name=f"{values}.swapped", axis=3)
        swapped = graph.op("Mul", swapped, sine, name=f"{values}.moved")
        kept = graph.op("Mul", values, cosine, name=f"{values}.kept")
        return graph.op("Add", kept, swapped, name=f"{values}.rotated")

    def _gated_mlp(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        names = [f"{prefix}mlp.fc1_{letter}" for letter in "gx"]
        rows = graph.joined_linear(states, f"{prefix}mlp.fc1", names)
        gate, hidden = graph.split(rows, ("gate", "value"), axis=1)
        share = graph.op("Sigmoid", gate, name=f"{prefix}mlp.share")
        gate = graph.op("Mul", gate, share, name=f"{prefix}mlp.gate")
        hidden = graph.op("Mul", gate, hidden, name=f"{prefix}mlp.gated")
        hidden = self._norm(graph, hidden, f"{prefix}mlp.norm")
        return graph.stored_linear(hidden, f"{prefix}mlp.fc2")


def _mlp(graph: GraphBuilder, states: str, prefix: str) -> str:
    return mlp(graph, states, prefix, TIMM.mlp, "gelu")
