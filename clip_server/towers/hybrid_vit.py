"""timm's vision transformer after a stem of convolutions, the image tower of MobileCLIP-B."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clip_server.model_card import ImageSpec
from clip_server.towers.convolution import Convolution, batch_norm_shapes, merge_neighbours
from clip_server.towers.layout import of_first_positions
from clip_server.towers.patches import convolve_patches, place_patches
from clip_server.towers.timm_vit import Size
from clip_server.towers.tower import (
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
_STEM = f"{_PREFIX}patch_embed.backbone."
_EPSILON = 1e-6
# Sides of the stem's kernels, which are their strides as well.
_SIDES = (4, 2, 2)
# How many times narrower the stem is inside.
_NARROWER = 4
# By timm's names.
SIZES = {"vit_base_mci_224": Size(768, 12, 12)}


@dataclass(frozen=True)
class HybridVit(TimmTower):
    """grid: positions of an image's side in the transformer."""

    blocks: Transformer
    grid: int

    @classmethod
    def from_config(cls, config: Config) -> HybridVit | None:
        trunk = cls.trunk(config)
        size = SIZES.get(trunk.name)
        if size is None or trunk.ending != ("token", None):
            return None
        blocks = Transformer(_PREFIX, *size, epsilon=_EPSILON, names=TIMM)
        return cls(blocks, config["vision_cfg"]["image_size"] // math.prod(_SIDES))

    @property
    def _length(self) -> int:
        return self.grid**2 + 1

    def _stem_shapes(self) -> Shapes:
        """The name and shape of the stem's kernels."""
        inside, width = self.blocks.width // _NARROWER, self.blocks.width
        channels = ((3, inside), (inside, inside), (inside, width))
        return {
            f"{_STEM}{index}.conv.weight": (outputs, inputs, side, side)
            for index, ((inputs, outputs), side) in enumerate(zip(channels, _SIDES, strict=True))
        }

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        return {
            **self._stem_shapes(),
            **batch_norm_shapes(f"{_STEM}0.bn", width // _NARROWER),
            **batch_norm_shapes(f"{_STEM}1.bn", width // _NARROWER),
            f"{_STEM}2.conv.bias": (width,),
            f"{_PREFIX}cls_token": (1, 1, width),
            f"{_PREFIX}pos_embed": (1, self.grid**2, width),
            **norm_shapes(f"{_PREFIX}norm", width),
            **linear_shapes(f"{_PREFIX}head", width, dim),
            **self.blocks.shapes(),
        }

    def macs(self, dim: int) -> int:
        kernels = [math.prod(shape) for shape in self._stem_shapes().values()]
        positions = [(self.grid * scale) ** 2 for scale in (4, 2, 1)]
        stem = sum(each * count for each, count in zip(kernels, positions, strict=True))
        return stem + self.blocks.macs(self._length) + self.blocks.width * dim

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        patches = self._build_stem(graph, image, target)
        token = graph.weight(f"{_PREFIX}cls_token").reshape(-1)
        # The class token has no position.
        positions = np.pad(graph.weight(f"{_PREFIX}pos_embed")[0], [(1, 0), (0, 0)])
        states = place_patches(graph, patches, positions, token)
        pooled = self.blocks.build(graph, states, of_first_positions(graph, self._length))
        pooled = graph.layer_norm(pooled, f"{_PREFIX}norm", _EPSILON)
        return graph.stored_linear(pooled, f"{_PREFIX}head")

    def _build_stem(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        """The embedding of every position, [B, G * G, W]."""
        names, grid, width = [f"{_STEM}{index}" for index in range(3)], self.grid, self.blocks.width
        first = Convolution.stored(graph, f"{names[0]}.conv", f"{names[0]}.bn")
        rows = convolve_patches(graph, image, target, names[0], first, 4 * grid)
        rows = graph.gelu(rows, f"{names[0]}.gelu")
        second = Convolution.stored(graph, f"{names[1]}.conv", f"{names[1]}.bn")
        rows = merge_neighbours(graph, rows, names[1], second, 2 * grid)
        rows = graph.gelu(rows, f"{names[1]}.gelu")
        third = Convolution.stored(graph, f"{names[2]}.conv")
        rows = merge_neighbours(graph, rows, names[2], third, grid)
        return graph.op("Reshape", rows, graph.integers(-1, grid**2, width), name="positions")
