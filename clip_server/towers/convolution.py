"""Convolutions of a checkpoint, with what is folded into them: batch norms, scales, parallel
branches. Before and after them, states as channels or as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.towers.tower import EPSILON, Shapes, norm_shapes

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Convolution:
    """kernel: [O, I / groups, K, K]. bias: [O]. Both in float64, since they are computed from
    several tensors."""

    kernel: Values
    bias: Values

    @classmethod
    def stored(cls, graph: GraphBuilder, name: str, norm: str | None = None) -> Convolution:
        """A torch Conv2d of the checkpoint, with or without a bias.

        norm: the name of the batch norm that follows it, if one does.
        """
        kernel = graph.weight(f"{name}.weight").astype(np.float64)
        bias = np.zeros(len(kernel))
        if graph.has_weight(f"{name}.bias"):
            bias += graph.weight(f"{name}.bias")
        found = cls(kernel, bias)
        return found if norm is None else found.scaled(*batch_norm(graph, norm))

    @classmethod
    def identity(cls, width: int, *, depthwise: bool = True) -> Convolution:
        """The one that changes nothing."""
        kernel = np.ones((width, 1)) if depthwise else np.eye(width)
        return cls(kernel[..., np.newaxis, np.newaxis], np.zeros(width))

    @property
    def side(self) -> int:
        """K."""
        return int(self.kernel.shape[-1])

    def __add__(self, other: Convolution) -> Convolution:
        """The sum of the outputs of both; a smaller kernel is centred in the larger."""
        side = max(self.side, other.side)
        return Convolution(self._padded(side) + other._padded(side), self.bias + other.bias)

    def scaled(self, scale: Values, shift: Values | float = 0.0) -> Convolution:
        """With each output channel times its scale, plus its shift, each [O]."""
        kernel = self.kernel * scale.reshape(-1, 1, 1, 1)
        return Convolution(kernel, self.bias * scale + shift)

    def _padded(self, side: int) -> Values:
        margin = (side - self.side) // 2
        return np.pad(self.kernel, [(0, 0), (0, 0), (margin, margin), (margin, margin)])

    def build(
        self, graph: GraphBuilder, source: str, name: str, *, stride: int = 1, groups: int = 1
    ) -> str:
        """source [B, I, S, S] to [B, O, S / stride, S / stride], as `GraphBuilder.convolution`."""
        kernel, bias = self.kernel.astype(np.float32), self.bias.astype(np.float32)
        return graph.convolution(source, name, kernel, bias, stride=stride, groups=groups)


def batch_norm(graph: GraphBuilder, name: str) -> tuple[Values, Values]:
    """The scale and the shift, each [C], of a torch BatchNorm of the checkpoint."""
    variance = graph.weight(f"{name}.running_var").astype(np.float64)
    scale = graph.weight(f"{name}.weight") / np.sqrt(variance + EPSILON)
    return scale, graph.weight(f"{name}.bias") - graph.weight(f"{name}.running_mean") * scale


def convolution_shapes(name: str, inputs: int, outputs: int, side: int) -> Shapes:
    """The tensors of a torch Conv2d with a bias. inputs: of each group. side: of the kernel."""
    return {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}


def batch_norm_shapes(name: str, width: int) -> Shapes:
    """The tensors of a torch BatchNorm."""
    moments: Shapes = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    return norm_shapes(name, width) | moments


def to_rows(graph: GraphBuilder, states: str, width: int, prefix: str) -> str:
    """Channels of every position, [B, W, G, G], to rows [B * G * G, W].

    prefix: of the names of the nodes.
    """
    moved = graph.op("Transpose", states, name=f"{prefix}positions", perm=[0, 2, 3, 1])
    return graph.op("Reshape", moved, graph.integers(-1, width), name=f"{prefix}rows")


def to_channels(graph: GraphBuilder, rows: str, grid: int, width: int, prefix: str) -> str:
    """The inverse of `to_rows`."""
    shape = graph.integers(-1, grid, grid, width)
    squares = graph.op("Reshape", rows, shape, name=f"{prefix}squares")
    return graph.op("Transpose", squares, name=f"{prefix}channels", perm=[0, 3, 1, 2])


def merge_neighbours(
    graph: GraphBuilder, rows: str, name: str, convolution: Convolution, grid: int
) -> str:
    """A convolution of squares of two positions by two: rows [B * 4 G * G, I] to [B * G * G, O].

    grid: G. A stride as wide as the kernel makes it one Gemm.
    """
    outputs, inputs = convolution.kernel.shape[:2]
    shape = graph.integers(-1, grid, 2, grid, 2, inputs)
    squares = graph.op("Reshape", rows, shape, name=f"{name}.squares")
    moved = graph.op("Transpose", squares, name=f"{name}.moved", perm=[0, 1, 3, 2, 4, 5])
    rows = graph.op("Reshape", moved, graph.integers(-1, 4 * inputs), name=f"{name}.merged")
    weight = convolution.kernel.transpose(0, 2, 3, 1).reshape(outputs, -1)
    bias = convolution.bias.astype(np.float32)
    return graph.linear(rows, name, weight.astype(np.float32), bias)
