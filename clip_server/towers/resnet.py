"""OpenAI's ResNet: a stem of three convolutions, anti-aliased strides, attention pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clip_server.model_card import ImageSpec
from clip_server.towers.attention import Attention
from clip_server.towers.convolution import Convolution, batch_norm_shapes
from clip_server.towers.layout import every_nth, of_all_positions
from clip_server.towers.pixels import normalised
from clip_server.towers.tower import (
    Config,
    ImageTower,
    Shapes,
    Target,
    linear_shapes,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual."
# The factor by which all strides together shrink an image's side.
_SHRINKS = 32


@dataclass(frozen=True)
class ResNet(ImageTower):
    """layers: bottlenecks of each stage. heads, grid: of the attention pooling."""

    layers: tuple[int, ...]
    width: int
    heads: int
    grid: int

    keys = frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"})

    @classmethod
    def from_config(cls, config: Config) -> ResNet | None:
        vision = config["vision_cfg"]
        layers = vision.get("layers")
        if not vision.keys() <= cls.keys or not isinstance(layers, list):
            return None
        size, width = vision.get("image_size", 224), vision.get("width", 768)
        size = size[0] if isinstance(size, list) else size
        heads = width * 32 // vision.get("head_width", 64)
        return cls(tuple(layers), width, heads, grid=size // _SHRINKS)

    def shapes(self, dim: int) -> Shapes:
        half, pooled = self.width // 2, 32 * self.width
        shapes: Shapes = {
            **_convolution_shapes(_PREFIX, 1, 3, half, 3),
            **_convolution_shapes(_PREFIX, 2, half, half, 3),
            **_convolution_shapes(_PREFIX, 3, half, self.width, 3),
        }
        for prefix, channels, planes, stride in self._bottlenecks():
            shapes |= _convolution_shapes(prefix, 1, channels, planes, 1)
            shapes |= _convolution_shapes(prefix, 2, planes, planes, 3)
            shapes |= _convolution_shapes(prefix, 3, planes, 4 * planes, 1)
            if stride > 1 or channels != 4 * planes:
                shapes[f"{prefix}downsample.0.weight"] = (4 * planes, channels, 1, 1)
                shapes |= batch_norm_shapes(f"{prefix}downsample.1", 4 * planes)
        pool = f"{_PREFIX}attnpool."
        shapes[f"{pool}positional_embedding"] = (self.grid**2 + 1, pooled)
        for name in ("q_proj", "k_proj", "v_proj"):
            shapes |= linear_shapes(pool + name, pooled, pooled)
        return shapes | linear_shapes(f"{pool}c_proj", pooled, dim)

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        del target  # the same graph for all
        states = _convolved(graph, normalised(graph, image), _PREFIX, 1, stride=2)
        states = _convolved(graph, states, _PREFIX, 2)
        states = _convolved(graph, states, _PREFIX, 3)
        states = _average(graph, states, 2, f"{_PREFIX}avgpool")
        for prefix, channels, planes, stride in self._bottlenecks():
            project = stride > 1 or channels != 4 * planes
            states = _bottleneck(graph, states, prefix, stride, project)
        return self._attention_pool(graph, states)

    def _bottlenecks(self) -> list[tuple[str, int, int, int]]:
        """(tensor prefix, channels in, channels inside, stride) of each, in order."""
        found, channels = [], self.width
        for stage, blocks in enumerate(self.layers):
            planes = self.width * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                prefix = f"{_PREFIX}layer{stage + 1}.{block}."
                found.append((prefix, channels, planes, stride))
                channels = 4 * planes
        return found

    def _attention_pool(self, graph: GraphBuilder, states: str) -> str:
        """Attention of the mean over the positions [B, C, G, G]: [B, D]."""
        prefix, channels, length = f"{_PREFIX}attnpool.", 32 * self.width, self.grid**2 + 1
        states = graph.op("Reshape", states, graph.integers(0, channels, -1), name="positions.flat")
        mean = graph.op("ReduceMean", states, graph.integers(2), name="positions.mean")
        states = graph.op("Concat", mean, states, name="positions.all", axis=2)
        states = graph.op("Transpose", states, name="positions", perm=[0, 2, 1])
        table = graph.weight(f"{prefix}positional_embedding")
        shift = graph.floats("positions.shift", table)
        states = graph.op("Add", states, shift, name="positions.placed")
        states = graph.op("Reshape", states, graph.integers(-1, channels), name="positions.rows")
        names = [f"{prefix}{name}_proj" for name in "qkv"]
        attention = Attention.of_linears(graph, f"{prefix}attn", self.heads, names)
        first, layout = every_nth(graph, length)(states), of_all_positions(graph, length)
        query, key, value = attention.project_pooled(first, states, layout)
        attended = attention.attend(query, key, value, mask=None)
        return graph.stored_linear(attended, f"{prefix}c_proj")


def _convolution_shapes(prefix: str, index: int, inputs: int, outputs: int, kernel: int) -> Shapes:
    weight: Shapes = {f"{prefix}conv{index}.weight": (outputs, inputs, kernel, kernel)}
    return weight | batch_norm_shapes(f"{prefix}bn{index}", outputs)


def _bottleneck(graph: GraphBuilder, states: str, prefix: str, stride: int, project: bool) -> str:
    hidden = _convolved(graph, states, prefix, 1)
    hidden = _convolved(graph, hidden, prefix, 2)
    hidden = _average(graph, hidden, stride, f"{prefix}avgpool")
    hidden = _folded(graph, hidden, f"{prefix}conv3", f"{prefix}bn3")
    if project:
        states = _average(graph, states, stride, f"{prefix}downsample.-1")
        states = _folded(graph, states, f"{prefix}downsample.0", f"{prefix}downsample.1")
    summed = graph.op("Add", hidden, states, name=f"{prefix}sum")
    return graph.op("Relu", summed, name=f"{prefix}relu3")


def _convolved(graph: GraphBuilder, states: str, prefix: str, index: int, stride: int = 1) -> str:
    states = _folded(graph, states, f"{prefix}conv{index}", f"{prefix}bn{index}", stride)
    return graph.op("Relu", states, name=f"{prefix}relu{index}")


def _folded(graph: GraphBuilder, states: str, conv: str, norm: str, stride: int = 1) -> str:
    """A convolution with the batch norm that follows it folded into its weights."""
    folded = Convolution.stored(graph, conv, norm)
    return folded.build(graph, states, conv, stride=stride)


def _average(graph: GraphBuilder, states: str, stride: int, name: str) -> str:
    if stride == 1:
        return states
    size = [stride] * 2
    return graph.op("AveragePool", states, name=name, kernel_shape=size, strides=size)
