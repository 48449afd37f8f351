"""CLIP's vision transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_server.model_card import ImageSpec
from clip_server.towers.layout import of_first_positions
from clip_server.towers.pixels import normalisation
from clip_server.towers.tower import (
    Config,
    ImageTower,
    SavedByTransformers,
    Shapes,
    Target,
    norm_shapes,
)
from clip_server.towers.transformer import TRANSFORMERS_PARTS, Transformer, saved_with_quick_gelu

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual."


@dataclass(frozen=True)
class VisionTransformer(ImageTower):
    """patch: pixels of a patch's side. grid: patches of an image's side."""

    blocks: Transformer
    patch: int
    grid: int

    keys = frozenset({"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"})
    saved = SavedByTransformers(
        model_types=("clip", "chinese_clip"),
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        prefixes={
            "vision_model.embeddings.class_embedding": "visual.class_embedding",
            "vision_model.embeddings.patch_embedding": "visual.conv1",
            "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
            "vision_model.pre_layrnorm": "visual.ln_pre",
            "vision_model.post_layernorm": "visual.ln_post",
            "vision_model.encoder.layers": "visual.transformer.resblocks",
        },
        parts=TRANSFORMERS_PARTS,
        transposed={"visual_projection.weight": "visual.proj"},
    )

    @classmethod
    def from_config(cls, config: Config) -> VisionTransformer | None:
        vision = config["vision_cfg"]
        if not vision.keys() <= cls.keys or isinstance(vision.get("layers"), list):
            return None
        size, width = vision.get("image_size", 224), vision.get("width", 768)
        size = size[0] if isinstance(size, list) else size
        patch = vision.get("patch_size", 16)
        blocks = Transformer(
            _PREFIX,
            width,
            vision.get("layers", 12),
            heads=width // vision.get("head_width", 64),
            mlp_ratio=vision.get("mlp_ratio", 4.0),
            quick_gelu=config.get("quick_gelu", False),
        )
        return cls(blocks, patch, grid=size // patch)

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        width = saved["hidden_size"]
        vision = {
            "image_size": saved["image_size"],
            "layers": saved["num_hidden_layers"],
            "width": width,
            "head_width": width // saved["num_attention_heads"],
            "patch_size": saved["patch_size"],
            "mlp_ratio": saved["intermediate_size"] / width,
        }
        return {"vision_cfg": vision, "quick_gelu": saved_with_quick_gelu(saved)}

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        shapes: Shapes = {
            "conv1.weight": (width, 3, self.patch, self.patch),
            "class_embedding": (width,),
            "positional_embedding": (self.grid**2 + 1, width),
            **norm_shapes("ln_pre", width),
            **norm_shapes("ln_post", width),
            "proj": (width, dim),
        }
        return {_PREFIX + name: shape for name, shape in shapes.items()} | self.blocks.shapes()

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        width, length = self.blocks.width, self.grid**2 + 1
        patches = self._patches(graph, image, target)
        patches = graph.op(
            "Reshape", patches, graph.integers(-1, length - 1, width), name="patches"
        )
        positions = graph.weight(f"{_PREFIX}positional_embedding")
        shift = graph.floats("patches.position", positions[1:])
        patches = graph.op("Add", patches, shift, name="patches.placed")
        # The class token is the same for every image, its position included.
        token = positions[0] + graph.weight(f"{_PREFIX}class_embedding")
        token = graph.floats("class_token", token.reshape(1, 1, width))
        batch = graph.op("Shape", "pixels", name="batch", start=0, end=1)
        shape = graph.op(
            "Concat", batch, graph.integers(1, width), name="class_token.shape", axis=0
        )
        token = graph.op("Expand", token, shape, name="class_tokens")
        states = graph.op("Concat", token, patches, name="states", axis=1)
        states = graph.op("Reshape", states, graph.integers(-1, width), name="states.flat")
        states = graph.layer_norm(states, f"{_PREFIX}ln_pre")

        pooled = self.blocks.build(graph, states, of_first_positions(graph, length))
        pooled = graph.layer_norm(pooled, f"{_PREFIX}ln_post")
        return graph.projection(pooled, f"{_PREFIX}proj")

    def _patches(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        """The embedding of every patch, [B * G * G, W].

        A stride as wide as the kernel makes the convolution one Gemm. The pixels are moved while
        they are uint8, except for TensorRT, which only casts uint8; their normalisation is part
        of the weight and the bias.
        """
        patch, grid = self.patch, self.grid
        pixels, linear = "pixels", graph.linear_from_uint8
        if target == "tensorrt":
            pixels, linear = graph.cast_from_uint8(pixels), graph.linear
        pixels = _cropped(graph, pixels, patch * grid, image.size)
        shape = graph.integers(-1, 3, grid, patch, grid, patch)
        pixels = graph.op("Reshape", pixels, shape, name="pixels.by_patch")
        pixels = graph.op("Transpose", pixels, name="pixels.of_patch", perm=[0, 2, 4, 1, 3, 5])
        pixels = graph.op("Reshape", pixels, graph.integers(-1, 3 * patch**2), name="pixels.rows")
        scale, shift = normalisation(image)
        kernel = graph.weight(f"{_PREFIX}conv1.weight").astype(np.float64)
        weight = (kernel * scale).reshape(self.blocks.width, -1).astype(np.float32)
        bias = (kernel * shift).sum(axis=(1, 2, 3)).astype(np.float32)
        return linear(pixels, f"{_PREFIX}conv1", weight, bias)


def _cropped(graph: GraphBuilder, pixels: str, wanted: int, size: int) -> str:
    """The pixels that the patches cover; those left over at the right and bottom are not used."""
    if wanted == size:
        return pixels
    starts, ends, axes = graph.integers(0, 0), graph.integers(wanted, wanted), graph.integers(2, 3)
    return graph.op("Slice", pixels, starts, ends, axes, name="pixels.cropped")
