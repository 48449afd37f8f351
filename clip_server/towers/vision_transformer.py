"""open_clip's own vision transformer: CLIP's, CLIPA's and CoCa's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clip_server.model_card import ImageSpec
from clip_server.towers.attention import attend_from
from clip_server.towers.layout import of_all_positions, of_first_positions
from clip_server.towers.patches import embed_patches, mean_of_patches, place_patches
from clip_server.towers.tower import (
    Config,
    ImageTower,
    SavedByTransformers,
    Shapes,
    Target,
    linear_shapes,
    norm_shapes,
)
from clip_server.towers.transformer import (
    TRANSFORMERS_PARTS,
    Transformer,
    clip_activation,
    has_quick_gelu,
    norm_epsilon,
    saved_options,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PREFIX = "visual."
Pool = Literal["token", "mean", "attention"]


@dataclass(frozen=True)
class VisionTransformer(ImageTower):
    """patch: pixels of a patch's side. grid: patches of an image's side.

    norm_first: whether a layer norm precedes the blocks.
    pool: the class token, as in CLIP; the mean over the patches, as in CLIPA; or attention, as in
        CoCa, with `pool_heads` heads and `pool_queries` queries.
    """

    blocks: Transformer
    patch: int
    grid: int
    norm_first: bool = True
    pool: Pool = "token"
    pool_heads: int = 8
    pool_queries: int = 256

    keys = frozenset(
        {
            "image_size",
            "layers",
            "width",
            "patch_size",
            "head_width",
            "mlp_ratio",
            "no_ln_pre",
            "pool_type",
            "final_ln_after_pool",
            "attentional_pool",
            "attn_pooler_heads",
            "attn_pooler_queries",
            "output_tokens",
            "act_kwargs",
            "norm_kwargs",
        }
    )
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
        pool, epsilon = _pool(vision), norm_epsilon(vision)
        activation = clip_activation(config, vision)
        if not vision.keys() <= cls.keys or isinstance(vision.get("layers"), list):
            return None
        if pool is None or activation is None or epsilon is None:
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
            activation=activation,
            epsilon=epsilon,
        )
        return cls(
            blocks,
            patch,
            grid=size // patch,
            norm_first=not vision.get("no_ln_pre", False),
            pool=pool,
            pool_heads=vision.get("attn_pooler_heads", cls.pool_heads),
            pool_queries=vision.get("attn_pooler_queries", cls.pool_queries),
        )

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
            **saved_options(saved),
        }
        return {"vision_cfg": vision, "quick_gelu": has_quick_gelu(saved)}

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        shapes: Shapes = {
            "conv1.weight": (width, 3, self.patch, self.patch),
            "class_embedding": (width,),
            "positional_embedding": (self.grid**2 + 1, width),
        }
        if self.norm_first:
            shapes |= norm_shapes("ln_pre", width)
        pooled = width
        if self.pool == "attention":
            pooled = dim
            shapes |= self._pool_shapes(dim)
        shapes |= {**norm_shapes("ln_post", pooled), "proj": (pooled, dim)}
        return {_PREFIX + name: shape for name, shape in shapes.items()} | self.blocks.shapes()

    def _pool_shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        shapes: Shapes = {
            "query": (self.pool_queries, dim),
            "attn.in_proj_bias": (3 * dim,),
            **linear_shapes("attn.out_proj", dim, dim),
            **norm_shapes("ln_q", dim),
            **norm_shapes("ln_k", width),
        }
        # As torch stores them: in one if queries are as wide as what they attend to.
        if width == dim:
            shapes["attn.in_proj_weight"] = (3 * dim, dim)
        else:
            inputs = {"q": dim, "k": width, "v": width}
            shapes |= {f"attn.{part}_proj_weight": (dim, size) for part, size in inputs.items()}
        return {f"attn_pool.{name}": shape for name, shape in shapes.items()}

    def macs(self, dim: int) -> int:
        width, length = self.blocks.width, self.grid**2 + 1
        patches = self.grid**2 * 3 * self.patch**2 * width
        pooling = 2 * length * dim * (width + 1) + dim**2 if self.pool == "attention" else 0
        projected = dim if self.pool == "attention" else width
        return patches + self.blocks.macs(length) + pooling + projected * dim

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        length = self.grid**2 + 1
        patches = embed_patches(graph, image, target, f"{_PREFIX}conv1", self.grid)
        positions = graph.weight(f"{_PREFIX}positional_embedding")
        token = graph.weight(f"{_PREFIX}class_embedding")
        states = place_patches(graph, patches, positions, token)
        if self.norm_first:
            states = graph.layer_norm(states, f"{_PREFIX}ln_pre", self.blocks.epsilon)
        pooled = self._pooled(graph, states, length)
        pooled = graph.layer_norm(pooled, f"{_PREFIX}ln_post", self.blocks.epsilon)
        return graph.projection(pooled, f"{_PREFIX}proj")

    def _pooled(self, graph: GraphBuilder, states: str, length: int) -> str:
        """All blocks: states [B * L, W] to one of each image, [B, W]."""
        if self.pool == "token":
            return self.blocks.build(graph, states, of_first_positions(graph, length))
        states = self.blocks.build(graph, states, of_all_positions(graph, length))
        if self.pool == "mean":
            return mean_of_patches(graph, states, length, self.blocks.width, first=1)
        return self._attention_pool(graph, states, length)

    def _attention_pool(self, graph: GraphBuilder, states: str, length: int) -> str:
        """CoCa's pooling: of its many learned queries, the first gives the embedding."""
        prefix = f"{_PREFIX}attn_pool."
        states = graph.layer_norm(states, f"{prefix}ln_k", self.blocks.epsilon)
        # Computed here, since it is the same for every image.
        query = graph.weight(f"{prefix}query")[0]
        query = _normed(query, graph, f"{prefix}ln_q", self.blocks.epsilon)
        if graph.has_weight(f"{prefix}attn.in_proj_weight"):
            weights = np.split(graph.weight(f"{prefix}attn.in_proj_weight"), 3)
        else:
            weights = [graph.weight(f"{prefix}attn.{part}_proj_weight") for part in "qkv"]
        biases = np.split(graph.weight(f"{prefix}attn.in_proj_bias"), 3)
        query = weights[0] @ query + biases[0]
        kv = np.concatenate(weights[1:]), np.concatenate(biases[1:])
        pooled = attend_from(graph, f"{prefix}attn", query, kv, states, length, self.pool_heads)
        return graph.stored_linear(pooled, f"{prefix}attn.out_proj")


def _pool(vision: Mapping[str, Any]) -> Pool | None:
    """How a tower pools; None if it is unknown."""
    kind, after = vision.get("pool_type", "tok"), vision.get("final_ln_after_pool", False)
    if vision.get("attentional_pool", False):
        is_coca = vision["attentional_pool"] is True and kind == "tok" and not after
        return "attention" if is_coca else None
    if kind == "tok":
        return "token"  # the norm of one position is the same before and after
    return "mean" if kind == "avg" and after else None


def _normed(
    values: NDArray[np.float32], graph: GraphBuilder, tensor: str, epsilon: float
) -> NDArray[np.float32]:
    """A torch LayerNorm of the checkpoint, of a constant [W]."""
    wide = values.astype(np.float64)
    unit = (wide - wide.mean()) / np.sqrt(wide.var() + epsilon)
    normed: NDArray[np.float64] = unit * graph.weight(f"{tensor}.weight") + graph.weight(
        f"{tensor}.bias"
    )
    return normed.astype(np.float32)
