"""SigLIP's towers as transformers saves them, in a `SiglipModel`. open_clip's checkpoints of the
same models have timm's image tower (see `timm_vit`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_server.model_card import ImageSpec
from clip_server.towers.attention import attend_from
from clip_server.towers.clip_text import ClipText
from clip_server.towers.layout import of_all_positions
from clip_server.towers.patches import embed_patches, place_patches
from clip_server.towers.tower import (
    Config,
    ImageTower,
    SavedByTransformers,
    Shapes,
    Target,
    TextSavedByTransformers,
    linear_shapes,
    norm_shapes,
)
from clip_server.towers.transformer import (
    OPEN_CLIP,
    Transformer,
    clip_activation,
    mlp,
    norm_epsilon,
)
from clip_server.towers.vision_transformer import VisionTransformer

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

PREFIX = "visual."
_POOL = f"{PREFIX}head."
# What both towers have where their configuration does not say it.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
# That with which the training began; a checkpoint has its own.
_LOGIT_BIAS = -10


@dataclass(frozen=True)
class SiglipVision(ImageTower):
    """patch: pixels of a patch's side. grid: patches of an image's side.

    The key `siglip` marks the `vision_cfg`, which otherwise has those of `VisionTransformer`.
    """

    blocks: Transformer
    patch: int
    grid: int

    keys = frozenset({"siglip"})
    torch_module = "clip_server.runtimes.torch_siglip:SiglipVisionTower"
    saved = SavedByTransformers(
        model_types=("siglip",),
        defaults=_DEFAULTS | {"image_size": 224, "patch_size": 16},
        prefixes={"vision_model.head.": _POOL},
    )

    @classmethod
    def from_config(cls, config: Config) -> SiglipVision | None:
        vision = config["vision_cfg"]
        if "siglip" not in vision:
            return None
        activation, epsilon = clip_activation(config, vision), norm_epsilon(vision)
        if activation is None or epsilon is None:
            return None
        width = vision["width"]
        heads = width // vision["head_width"]
        blocks = Transformer(
            PREFIX, width, vision["layers"], heads, vision["mlp_ratio"], activation, epsilon
        )
        return cls(blocks, vision["patch_size"], vision["image_size"] // vision["patch_size"])

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        described = VisionTransformer.from_transformers(saved)
        described["vision_cfg"]["siglip"] = True
        return described

    def shapes(self, dim: int) -> Shapes:
        del dim  # the width
        width = self.blocks.width
        shapes: Shapes = {
            "conv1.weight": (width, 3, self.patch, self.patch),
            "conv1.bias": (width,),
            "positional_embedding": (self.grid**2, width),
            **norm_shapes("ln_post", width),
        }
        pool: Shapes = {
            "probe": (1, 1, width),
            "attention.in_proj_weight": (3 * width, width),
            "attention.in_proj_bias": (3 * width,),
            **linear_shapes("attention.out_proj", width, width),
            **norm_shapes("layernorm", width),
            **linear_shapes(OPEN_CLIP.mlp[0], width, self.blocks.mlp_width),
            **linear_shapes(OPEN_CLIP.mlp[1], self.blocks.mlp_width, width),
        }
        named = {PREFIX + name: shape for name, shape in shapes.items()}
        return named | self.blocks.shapes() | {_POOL + name: each for name, each in pool.items()}

    def macs(self, dim: int) -> int:
        del dim
        width, length = self.blocks.width, self.grid**2
        patches = length * 3 * self.patch**2 * width
        pool = 2 * length * width * (width + 1) + width * (width + 2 * self.blocks.mlp_width)
        return patches + self.blocks.macs(length) + pool

    def build(self, graph: GraphBuilder, image: ImageSpec, target: Target) -> str:
        length, epsilon = self.grid**2, self.blocks.epsilon
        patches = embed_patches(graph, image, target, f"{PREFIX}conv1", self.grid)
        states = place_patches(graph, patches, graph.weight(f"{PREFIX}positional_embedding"))
        states = self.blocks.build(graph, states, of_all_positions(graph, length))
        states = graph.layer_norm(states, f"{PREFIX}ln_post", epsilon)
        weight = np.split(graph.weight(f"{_POOL}attention.in_proj_weight"), 3)
        bias = np.split(graph.weight(f"{_POOL}attention.in_proj_bias"), 3)
        query = weight[0] @ graph.weight(f"{_POOL}probe").reshape(-1) + bias[0]
        kv = np.concatenate(weight[1:]), np.concatenate(bias[1:])
        heads = self.blocks.heads
        pooled = attend_from(graph, f"{_POOL}attn", query, kv, states, length, heads)
        pooled = graph.stored_linear(pooled, f"{_POOL}attention.out_proj")
        hidden = graph.layer_norm(pooled, f"{_POOL}layernorm", epsilon)
        hidden = mlp(graph, hidden, _POOL, OPEN_CLIP.mlp, self.blocks.activation)
        return graph.op("Add", pooled, hidden, name=f"{_POOL}pooled")


class SiglipText(ClipText):
    """SigLIP's text tower as transformers saves it; its configuration is that of a `ClipText`."""

    saved = TextSavedByTransformers(
        model_types=("siglip",),
        defaults=_DEFAULTS | {"max_position_embeddings": 64, "vocab_size": 32000},
        prefixes={"text_model.head": "text_projection"},
        vocabulary=None,
        resize="squash",
    )

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        described = super().from_transformers({**saved, "eos_token_id": saved["vocab_size"] - 1})
        described["text_cfg"] |= {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
        dim = saved.get("projection_size") or saved["hidden_size"]
        return described | {"embed_dim": dim, "init_logit_bias": _LOGIT_BIAS}
