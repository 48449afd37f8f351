"""Images as the positions of a transformer: a row for each square patch of pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec
from clip_server.towers.convolution import Convolution
from clip_server.towers.pixels import normalisation
from clip_server.towers.tower import Target

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder


def embed_patches(
    graph: GraphBuilder, image: ImageSpec, target: Target, convolution: str, grid: int
) -> str:
    """The embedding of every patch, [B, G * G, W].

    convolution: the prefix of its tensors: a kernel [W, 3, P, P], and a bias [W] if it has one.
    grid: G, patches of an image's side.
    """
    stored = Convolution.stored(graph, convolution)
    return convolve_patches(graph, image, target, convolution, stored, grid)


def convolve_patches(
    graph: GraphBuilder,
    image: ImageSpec,
    target: Target,
    name: str,
    convolution: Convolution,
    grid: int,
) -> str:
    """As `embed_patches`, of a convolution that is not that of the checkpoint alone.

    A stride as wide as the kernel makes the convolution one Gemm. The pixels are moved while they
    are uint8, except for TensorRT, which only casts uint8; their normalisation is part of the
    weight and the bias.
    """
    width, patch = convolution.kernel.shape[0], convolution.side
    pixels, linear = "pixels", graph.linear_from_uint8
    if target == "tensorrt":
        pixels, linear = graph.cast_from_uint8(pixels), graph.linear
    pixels = _cropped(graph, pixels, patch * grid, image.size)
    shape = graph.integers(-1, 3, grid, patch, grid, patch)
    pixels = graph.op("Reshape", pixels, shape, name="pixels.by_patch")
    pixels = graph.op("Transpose", pixels, name="pixels.of_patch", perm=[0, 2, 4, 1, 3, 5])
    pixels = graph.op("Reshape", pixels, graph.integers(-1, 3 * patch**2), name="pixels.rows")
    scale, shift = normalisation(image)
    weight = (convolution.kernel * scale).reshape(width, -1).astype(np.float32)
    bias = convolution.bias + (convolution.kernel * shift).sum(axis=(1, 2, 3))
    rows = linear(pixels, name, weight, bias.astype(np.float32))
    return graph.op("Reshape", rows, graph.integers(-1, grid**2, width), name="patches")


def place_patches(
    graph: GraphBuilder,
    patches: str,
    positions: NDArray[np.float32],
    class_token: NDArray[np.float32] | None = None,
) -> str:
    """Patches [B, N, W] with their positions, after a class token if there is one: [B * L, W].

    positions: [L, W]. class_token: [W].
    """
    width = positions.shape[1]
    if class_token is None:
        states = _shifted(graph, patches, positions)
    else:
        # The class token is the same for every image, its position included.
        first = graph.floats("class_token", (positions[0] + class_token).reshape(1, 1, width))
        batch = graph.op("Shape", "pixels", name="batch", start=0, end=1)
        shape = graph.op(
            "Concat", batch, graph.integers(1, width), name="class_token.shape", axis=0
        )
        first = graph.op("Expand", first, shape, name="class_tokens")
        patches = _shifted(graph, patches, positions[1:])
        states = graph.op("Concat", first, patches, name="states", axis=1)
    return graph.op("Reshape", states, graph.integers(-1, width), name="states.flat")


def mean_of_patches(graph: GraphBuilder, states: str, length: int, width: int, first: int) -> str:
    """The mean over the positions from `first` on, of states [B * L, W]: [B, W]."""
    shape = graph.integers(-1, length, width)
    states = graph.op("Reshape", states, shape, name="states.by_image")
    if first:
        start, end, axis = graph.integers(first), graph.integers(length), graph.integers(1)
        states = graph.op("Slice", states, start, end, axis, name="states.of_patches")
    return graph.op("ReduceMean", states, graph.integers(1), name="states.mean", keepdims=0)


def _shifted(graph: GraphBuilder, patches: str, positions: NDArray[np.float32]) -> str:
    shift = graph.floats("patches.position", positions)
    return graph.op("Add", patches, shift, name="patches.placed")


def _cropped(graph: GraphBuilder, pixels: str, wanted: int, size: int) -> str:
    """The pixels that the patches cover; those left over at the right and bottom are not used."""
    if wanted == size:
        return pixels
    starts, ends, axes = graph.integers(0, 0), graph.integers(wanted, wanted), graph.integers(2, 3)
    return graph.op("Slice", pixels, starts, ends, axes, name="pixels.cropped")
