"""timm's ViTamin: two stages of convolutions, then a transformer whose MLPs have a gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from clip_server.model_card import ImageSpec
from clip_server.towers.convolution import convolution_shapes, to_rows
from clip_server.towers.layout import of_all_positions
from clip_server.towers.patches import mean_of_patches, place_patches
from clip_server.towers.pixels import normalised
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

_TRUNK, _PROJECTION = "visual.trunk.", "visual.head.proj"
_BACKBONE = f"{_TRUNK}patch_embed.backbone."
_STEM, _POOL = f"{_BACKBONE}stem.", f"{_BACKBONE}pool."
# The trunk's name, and the side of an image.
_NAME = re.compile(r"(vitamin_\w+)_(\d+)")
_EPSILON = 1e-6
# Blocks of each stage of convolutions, and how many times wider a block is inside.
_BLOCKS, _WIDER = (2, 4), 4
# The factor by which all strides together shrink an image's side.
_SHRINKS = 16
_MLP_RATIO = 2.0


class Size(NamedTuple):
    """The dimensions of a trunk.

    channels: of each stage of convolutions.
    width, layers, heads: of the transformer.
    has_positions: whether the transformer has an embedding of each position.
    """

    channels: tuple[int, int]
    width: int
    layers: int
    heads: int
    has_positions: bool = True


class Block(NamedTuple):
    """A block of convolutions. prefix: of its tensors. inputs, outputs: channels."""

    prefix: str
    inputs: int
    outputs: int
    stride: int


_LARGE = Size((160, 320), 1024, 31, 16)
# By timm's names without the size of the image.
SIZES = {
    "vitamin_small": Size((64, 128), 384, 14, 6),
    "vitamin_base": Size((128, 256), 768, 14, 12),
    "vitamin_large": _LARGE,
    "vitamin_large2": _LARGE,
    "vitamin_xlarge": Size((192, 384), 1152, 32, 16, has_positions=False),
}


class GatedTransformer(Transformer):
    """Blocks whose MLP has a layer norm of its own, and a gate."""

    def mlp_shapes(self) -> Shapes:
        width, hidden = self.width, self.mlp_width
        return {
            **norm_shapes("mlp.norm", width),
            **linear_shapes("mlp.w0", width, hidden),
            **linear_shapes("mlp.w1", width, hidden),
            **linear_shapes("mlp.w2", hidden, width),
        }

    def macs(self, length: int) -> int:
        return super().macs(length) + self.layers * length * self.width * self.mlp_width

    def build_mlp(self, graph: GraphBuilder, states: str, prefix: str) -> str:
        states = graph.layer_norm(states, f"{prefix}mlp.norm", self.epsilon)
        names = [f"{prefix}mlp.w0", f"{prefix}mlp.w1"]
        rows = graph.joined_linear(states, f"{prefix}mlp.w01", names)
        gate, hidden = graph.split(rows, ("gate", "value"), axis=1)
        gate = graph.gelu(gate, f"{prefix}mlp.gate")
        hidden = graph.op("Mul", gate, hidden, name=f"{prefix}mlp.gated")
        return graph.stored_linear(hidden, f"{prefix}mlp.w2")


@dataclass(frozen=True)
class Vitamin(TimmTower):
    """image_size: pixels of an image's side."""

    size: Size
    image_size: int

    @classmethod
    def from_config(cls, config: Config) -> Vitamin | None:
        trunk = cls.trunk(config)
        found = _NAME.fullmatch(trunk.name)
        if not found or found[1] not in SIZES:
            return None
        if trunk.ending != ("", "linear") or trunk.has_projection_bias:
            return None
        size, image_size = SIZES[found[1]], config["vision_cfg"]["image_size"]
        if size.has_positions and image_size != int(found[2]):
            return None
        return cls(size, image_size)

    @property
    def _grid(self) -> int:
        """Positions of an image's side in the transformer."""
        return math.ceil(self.image_size / _SHRINKS)

    @property
    def _transformer(self) -> GatedTransformer:
        _, width, layers, heads, _ = self.size
        return GatedTransformer(
            _TRUNK, width, layers, heads, _MLP_RATIO, epsilon=_EPSILON, names=TIMM
        )

    def _blocks(self) -> Iterator[Block]:
        inputs = self.size.channels[0]
        for stage, (outputs, blocks) in enumerate(zip(self.size.channels, _BLOCKS, strict=True)):
            for index in range(blocks):
                prefix, stride = f"{_BACKBONE}stages.{stage}.{index}.", 1 if index else 2
                yield Block(prefix, inputs, outputs, stride)
                inputs = outputs

    def shapes(self, dim: int) -> Shapes:
        (first, last), width = self.size.channels, self.size.width
        shapes: Shapes = {
            **convolution_shapes(f"{_STEM}conv1", 3, first, 3),
            **norm_shapes(f"{_STEM}norm1", first),
            **convolution_shapes(f"{_STEM}conv2", first, first, 3),
            **norm_shapes(f"{_POOL}norm", last),
            **convolution_shapes(f"{_POOL}proj", last, width, 3),
            **self._transformer.shapes(),
            **norm_shapes(f"{_TRUNK}fc_norm", width),
            f"{_PROJECTION}.weight": (dim, width),
        }
        if self.size.has_positions:
            shapes[f"{_TRUNK}pos_embed"] = (1, self._grid**2, width)
        for block in self._blocks():
            shapes |= _block_shapes(block)
        return shapes

    def macs(self, dim: int) -> int:
        (first, last), width = self.size.channels, self.size.width
        side = math.ceil(self.image_size / 2)
        found = side**2 * 9 * (3 * first + first**2)
        for _, inputs, outputs, stride in self._blocks():
            inside = _WIDER * outputs
            found += side**2 * inputs * inside
            side = math.ceil(side / stride)
            found += side**2 * (9 * inside + inside * outputs)
            found += side**2 * inputs * outputs if inputs != outputs else 0
        length = self._grid**2
        return found + length * 9 * last * width + self._transformer.macs(length) + width * dim

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        del target  # the same graph for all
        width, length = self.size.width, self._grid**2
        states = self._placed(graph, self._convolved(graph, normalised(graph, image)))
        states = self._transformer.build(graph, states, of_all_positions(graph, length))
        pooled = mean_of_patches(graph, states, length, width, first=0)
        pooled = graph.layer_norm(pooled, f"{_TRUNK}fc_norm", _EPSILON)
        return graph.product(pooled, _PROJECTION, graph.weight(f"{_PROJECTION}.weight").T)

    def _convolved(self, graph: GraphBuilder, pixels: str) -> str:
        """Pixels [B, 3, S, S] as the channels of every position, [B, W, G, G]."""
        states = graph.stored_convolution(pixels, f"{_STEM}conv1", stride=2)
        states = _channel_norm(graph, states, f"{_STEM}norm1")
        states = graph.gelu(states, f"{_STEM}gelu")
        states = graph.stored_convolution(states, f"{_STEM}conv2")
        for block in self._blocks():
            states = _build_block(graph, states, block)
        states = _channel_norm(graph, states, f"{_POOL}norm")
        return graph.stored_convolution(states, f"{_POOL}proj", stride=2)

    def _placed(self, graph: GraphBuilder, states: str) -> str:
        """States [B, W, G, G] as the rows of the transformer, [B * G * G, W]."""
        width = self.size.width
        rows = to_rows(graph, states, width, _POOL)
        if not self.size.has_positions:
            return rows
        shape = graph.integers(-1, self._grid**2, width)
        patches = graph.op("Reshape", rows, shape, name="patches")
        return place_patches(graph, patches, graph.weight(f"{_TRUNK}pos_embed")[0])


def _block_shapes(block: Block) -> Shapes:
    prefix, inputs, outputs, _ = block
    inside = _WIDER * outputs
    shapes: Shapes = {
        **norm_shapes(f"{prefix}pre_norm", inputs),
        **convolution_shapes(f"{prefix}conv1_1x1", inputs, inside, 1),
        **convolution_shapes(f"{prefix}conv2_kxk", 1, inside, 3),
        **convolution_shapes(f"{prefix}conv3_1x1", inside, outputs, 1),
    }
    if inputs != outputs:
        shapes |= convolution_shapes(f"{prefix}shortcut.expand", inputs, outputs, 1)
    return shapes


def _build_block(graph: GraphBuilder, states: str, block: Block) -> str:
    """One block: states [B, I, S, S] to [B, O, S / stride, S / stride]."""
    prefix, inputs, outputs, stride = block
    hidden = _channel_norm(graph, states, f"{prefix}pre_norm")
    hidden = graph.stored_convolution(hidden, f"{prefix}conv1_1x1")
    hidden = graph.gelu(hidden, f"{prefix}act1")
    name, groups = f"{prefix}conv2_kxk", _WIDER * outputs
    hidden = graph.stored_convolution(hidden, name, stride=stride, groups=groups)
    hidden = graph.gelu(hidden, f"{prefix}act2")
    hidden = graph.stored_convolution(hidden, f"{prefix}conv3_1x1")
    if stride > 1:
        pooling = {"kernel_shape": [3, 3], "strides": [stride] * 2, "pads": [1] * 4}
        states = graph.op("AveragePool", states, name=f"{prefix}shortcut.pool", **pooling)
    if inputs != outputs:
        states = graph.stored_convolution(states, f"{prefix}shortcut.expand")
    return graph.op("Add", states, hidden, name=f"{prefix}states")


def _channel_norm(graph: GraphBuilder, states: str, name: str) -> str:
    """A torch LayerNorm over the channels of states [B, C, S, S]."""
    states = graph.op("Transpose", states, name=f"{name}.last", perm=[0, 2, 3, 1])
    states = graph.layer_norm(states, name, _EPSILON)
    return graph.op("Transpose", states, name=f"{name}.first", perm=[0, 3, 1, 2])
