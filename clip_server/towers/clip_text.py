"""open_clip's own text tower. CLIP's is causal and pools at the end token; SigLIP's, CLIPA's and
MobileCLIP's attend to every position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clip_server.model_card import Trim
from clip_server.towers.attention import slice_first
from clip_server.towers.layout import End, TextLayout, of_padded_texts, of_texts
from clip_server.towers.tower import (
    TOKENIZER_KEYS,
    Config,
    Shapes,
    Target,
    TextSavedByTransformers,
    TextTower,
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

# open_clip's `pool_type`s, each with the position that becomes the embedding; that of `eos` is the
# first `eos_id`.
_ENDS: dict[str, End] = {"argmax": "largest", "last": "last"}
_EOS, _DEFAULT_EOS_ID = "eos", 2
# What ends the tower: a matrix, a Linear with a bias, or nothing.
Projection = Literal["matrix", "linear", "none"]
# Configurations saved before the end token's id was corrected have this one.
_OLD_END = 2


@dataclass(frozen=True)
class ClipText(TextTower):
    """context: positions that have an embedding. vocabulary: tokens that have one.

    causal: whether a position attends only to those before it. end: becomes the embedding.
    """

    blocks: Transformer
    context: int
    vocabulary: int
    causal: bool
    end: End
    projection: Projection
    trim: Trim

    keys = TOKENIZER_KEYS | {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "no_causal_mask",
        "pool_type",
        "eos_id",
        "proj_type",
        "proj_bias",
        "norm_kwargs",
        "act_kwargs",
    }
    unused = ("text_decoder.",)  # CoCa's, which writes captions
    pad_id = None  # the tokenizer's, on which the tower does not depend
    saved = TextSavedByTransformers(
        model_types=("clip",),
        defaults={
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "max_position_embeddings": 77,
            "vocab_size": 49408,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "eos_token_id": 49407,
        },
        prefixes={
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.final_layer_norm": "ln_final",
            "text_model.encoder.layers": "transformer.resblocks",
        },
        parts=TRANSFORMERS_PARTS,
        transposed={"text_projection.weight": "text_projection"},
    )

    @property
    def max_length(self) -> int:
        return self.context

    @classmethod
    def from_config(cls, config: Config) -> ClipText | None:
        text = config["text_cfg"]
        pool = text.get("pool_type", "argmax")
        if not text.keys() <= cls.keys or pool not in (*_ENDS, _EOS):
            return None
        activation, epsilon = clip_activation(config, text), norm_epsilon(text)
        projection = _projection(text)
        if activation is None or epsilon is None or projection is None:
            return None
        blocks = Transformer(
            "",
            text.get("width", 512),
            text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_ratio=text.get("mlp_ratio", 4.0),
            activation=activation,
            epsilon=epsilon,
        )
        causal = not text.get("no_causal_mask", False)
        end = _ENDS.get(pool, text.get("eos_id", _DEFAULT_EOS_ID))
        return cls(
            blocks,
            context=text.get("context_length", 77),
            vocabulary=text.get("vocab_size", 49408),
            causal=causal,
            end=end,
            projection=projection,
            trim="causal" if causal and end != "last" else "fixed",
        )

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        width, vocabulary, end = saved["hidden_size"], saved["vocab_size"], saved["eos_token_id"]
        text = {
            "context_length": saved["max_position_embeddings"],
            "vocab_size": vocabulary,
            "width": width,
            "heads": saved["num_attention_heads"],
            "layers": saved["num_hidden_layers"],
            "mlp_ratio": saved["intermediate_size"] / width,
            **saved_options(saved),
        }
        if end not in (_OLD_END, vocabulary - 1):
            text |= {"pool_type": "eos", "eos_id": end}
        return {"text_cfg": text, "quick_gelu": has_quick_gelu(saved)}

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        projections: dict[Projection, Shapes] = {
            "matrix": {"text_projection": (width, dim)},
            "linear": linear_shapes("text_projection", width, dim),
            "none": {},
        }
        return {
            "token_embedding.weight": (self.vocabulary, width),
            "positional_embedding": (self.context, width),
            **norm_shapes("ln_final", width),
            **projections[self.projection],
            **self.blocks.shapes(),
        }

    def macs(self, dim: int, length: int) -> int:
        return self.blocks.macs(length) + self.blocks.width * dim

    def build(self, graph: GraphBuilder, target: Target) -> str:
        packed = target == "onnxruntime" and self.trim == "causal"
        layout = (of_texts if packed else of_padded_texts)(graph, self.end)
        table = graph.weight("token_embedding.weight")
        states = graph.lookup("token_embedding", table, layout.tokens)
        positions = graph.floats("positional_embedding", graph.weight("positional_embedding"))
        positions = graph.op("Gather", positions, layout.positions, name="positions.rows", axis=0)
        states = graph.op("Add", states, positions, name="states")
        masks = self._causal_masks(graph, layout) if self.causal else (None, None)
        pooled = self.blocks.build(graph, states, layout, mask=masks[0], pooled_mask=masks[1])
        return self._projected(graph, pooled)

    def _projected(self, graph: GraphBuilder, pooled: str) -> str:
        """The pooled states [B, W] as embeddings, [B, D]."""
        pooled = graph.layer_norm(pooled, "ln_final", self.blocks.epsilon)
        if self.projection == "none":
            return pooled
        if self.projection == "linear":
            return graph.stored_linear(pooled, "text_projection")
        return graph.projection(pooled, "text_projection")

    def _causal_masks(self, graph: GraphBuilder, layout: TextLayout) -> tuple[str, str]:
        """The masks of every position, [L, L], and of the pooled ones, [B, 1, 1, L]."""
        mask = np.triu(np.full((self.context, self.context), -np.inf, dtype=np.float32), k=1)
        causal = slice_first(graph, graph.floats("causal_mask", mask), layout.length, axes=[0, 1])
        last = graph.op("Gather", causal, layout.ends, name="end.mask.rows", axis=0)
        return causal, graph.op("Unsqueeze", last, graph.integers(1, 2), name="end.mask")


def _projection(text: Mapping[str, Any]) -> Projection | None:
    """The end of the tower; None if it is unknown."""
    kind = text.get("proj_type", "linear")
    if kind == "none":
        return "none"
    if kind != "linear":
        return None
    return "linear" if text.get("proj_bias", False) else "matrix"
