"""timm's ConvNeXt: a convolution in each channel, then an MLP over the channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from clip_server.model_card import ImageSpec
from clip_server.towers.convolution import Convolution, merge_neighbours, to_channels, to_rows
from clip_server.towers.patches import embed_patches, mean_of_patches
from clip_server.towers.tower import (
    EPSILON,
    Config,
    Shapes,
    Target,
    TimmTower,
    linear_shapes,
    norm_shapes,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_TRUNK, _HEAD = "visual.trunk.", "visual.head."
_MLP = ("mlp.fc1", "mlp.fc2")
# Pixels of a patch's side, the side of a kernel, and how many times wider an MLP is inside.
_PATCH, _KERNEL, _WIDER = 4, 7, 4
Projection = Literal["linear", "mlp"]


class Size(NamedTuple):
    """Channels and blocks of each stage, and the epsilon of the layer norms."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    epsilon: float = 1e-6


@dataclass(frozen=True)
class Stage:
    """One stage. index: its number. grid: positions of an image's side. inputs: channels before."""

    index: int
    inputs: int
    width: int
    blocks: int
    grid: int

    @property
    def prefix(self) -> str:
        """Of its tensors."""
        return f"{_TRUNK}stages.{self.index}."


# By timm's names.
SIZES = {
    "convnext_tiny": Size((96, 192, 384, 768), (3, 3, 9, 3)),
    "convnext_small": Size((96, 192, 384, 768), (3, 3, 27, 3)),
    "convnext_base": Size((128, 256, 512, 1024), (3, 3, 27, 3)),
    "convnext_large": Size((192, 384, 768, 1536), (3, 3, 27, 3)),
    "convnext_xlarge": Size((256, 512, 1024, 2048), (3, 3, 27, 3)),
    "convnext_xxlarge": Size((384, 768, 1536, 3072), (3, 4, 30, 3), EPSILON),
}


@dataclass(frozen=True)
class ConvNext(TimmTower):
    """grid: positions of an image's side in the first stage. projection: what ends the tower."""

    size: Size
    grid: int
    projection: Projection

    @classmethod
    def from_config(cls, config: Config) -> ConvNext | None:
        trunk = cls.trunk(config)
        size, (pool, projection) = SIZES.get(trunk.name), trunk.ending
        if size is None or projection not in ("linear", "mlp"):
            return None
        if pool or trunk.has_projection_bias:
            return None
        return cls(size, config["vision_cfg"]["image_size"] // _PATCH, projection)

    def _stages(self) -> Iterator[Stage]:
        widths = self.size.widths
        for index, (width, blocks) in enumerate(zip(widths, self.size.blocks, strict=True)):
            yield Stage(index, widths[max(index - 1, 0)], width, blocks, self.grid >> index)

    def shapes(self, dim: int) -> Shapes:
        first, last = self.size.widths[0], self.size.widths[-1]
        shapes: Shapes = {
            f"{_TRUNK}stem.0.weight": (first, 3, _PATCH, _PATCH),
            f"{_TRUNK}stem.0.bias": (first,),
            **norm_shapes(f"{_TRUNK}stem.1", first),
            **norm_shapes(f"{_TRUNK}head.norm", last),
        }
        for stage in self._stages():
            if stage.index:
                shapes |= norm_shapes(f"{stage.prefix}downsample.0", stage.inputs)
                shapes[f"{stage.prefix}downsample.1.weight"] = (stage.width, stage.inputs, 2, 2)
                shapes[f"{stage.prefix}downsample.1.bias"] = (stage.width,)
            for block in range(stage.blocks):
                shapes |= _block_shapes(f"{stage.prefix}blocks.{block}.", stage.width)
        if self.projection == "linear":
            return shapes | {f"{_HEAD}proj.weight": (dim, last)}
        shapes |= linear_shapes(f"{_HEAD}{_MLP[0]}", last, 2 * dim)
        return shapes | {f"{_HEAD}{_MLP[1]}.weight": (dim, 2 * dim)}

    def macs(self, dim: int) -> int:
        last = self.size.widths[-1]
        found = self.grid**2 * 3 * _PATCH**2 * self.size.widths[0]
        for stage in self._stages():
            block = stage.width * _KERNEL**2 + 2 * _WIDER * stage.width**2
            found += stage.grid**2 * stage.blocks * block
            found += stage.grid**2 * 4 * stage.inputs * stage.width if stage.index else 0
        return found + (last * dim if self.projection == "linear" else 2 * dim * (last + dim))

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        width, epsilon = self.size.widths[0], self.size.epsilon
        patches = embed_patches(graph, image, target, f"{_TRUNK}stem.0", self.grid)
        states = graph.op("Reshape", patches, graph.integers(-1, width), name="states.flat")
        states = graph.layer_norm(states, f"{_TRUNK}stem.1", epsilon)
        for stage in self._stages():
            if stage.index:
                states = self._downsampled(graph, states, stage)
            for block in range(stage.blocks):
                prefix = f"{stage.prefix}blocks.{block}."
                states = self._build_block(graph, states, prefix, stage)
        pooled = mean_of_patches(graph, states, stage.grid**2, stage.width, first=0)
        pooled = graph.layer_norm(pooled, f"{_TRUNK}head.norm", epsilon)
        return self._projected(graph, pooled)

    def _downsampled(self, graph: GraphBuilder, states: str, stage: Stage) -> str:
        """Rows [B * 4 G * G, C] to half the positions of a side, [B * G * G, W]."""
        name = f"{stage.prefix}downsample"
        states = graph.layer_norm(states, f"{name}.0", self.size.epsilon)
        convolution = Convolution.stored(graph, f"{name}.1")
        return merge_neighbours(graph, states, f"{name}.1", convolution, stage.grid)

    def _build_block(self, graph: GraphBuilder, states: str, prefix: str, stage: Stage) -> str:
        """One block: states [B * G * G, W] to the same."""
        hidden = to_channels(graph, states, stage.grid, stage.width, prefix)
        hidden = graph.stored_convolution(hidden, f"{prefix}conv_dw", groups=stage.width)
        hidden = to_rows(graph, hidden, stage.width, prefix)
        hidden = graph.layer_norm(hidden, f"{prefix}norm", self.size.epsilon)
        hidden = graph.stored_linear(hidden, f"{prefix}{_MLP[0]}")
        hidden = graph.gelu(hidden, f"{prefix}mlp.gelu")
        # The scale of the block is part of its last layer.
        hidden = graph.stored_linear(hidden, f"{prefix}{_MLP[1]}", graph.weight(f"{prefix}gamma"))
        return graph.op("Add", states, hidden, name=f"{prefix}states")

    def _projected(self, graph: GraphBuilder, pooled: str) -> str:
        """The mean of the positions, [B, W], as embeddings [B, D]."""
        if self.projection == "mlp":
            pooled = graph.stored_linear(pooled, f"{_HEAD}{_MLP[0]}")
            pooled = graph.gelu(pooled, f"{_HEAD}mlp.gelu")
        last = f"{_HEAD}proj" if self.projection == "linear" else f"{_HEAD}{_MLP[1]}"
        return graph.product(pooled, last, graph.weight(f"{last}.weight").T)


def _block_shapes(prefix: str, width: int) -> Shapes:
    shapes: Shapes = {
        "gamma": (width,),
        "conv_dw.weight": (width, 1, _KERNEL, _KERNEL),
        "conv_dw.bias": (width,),
        **norm_shapes("norm", width),
        **linear_shapes(_MLP[0], width, _WIDER * width),
        **linear_shapes(_MLP[1], _WIDER * width, width),
    }
    return {prefix + name: shape for name, shape in shapes.items()}
