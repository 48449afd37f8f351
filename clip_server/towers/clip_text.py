"""CLIP's own text tower: causal, pooled at the end token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_server.towers.attention import slice_first
from clip_server.towers.layout import of_padded_texts, of_texts
from clip_server.towers.tower import (
    TOKENIZER_KEYS,
    Config,
    Shapes,
    Target,
    TextSavedByTransformers,
    TextTower,
    norm_shapes,
)
from clip_server.towers.transformer import TRANSFORMERS_PARTS, Transformer, saved_with_quick_gelu

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# Configurations saved before the end token's id was corrected have this one.
_OLD_END = 2


@dataclass(frozen=True)
class ClipText(TextTower):
    """context: positions that have an embedding. vocabulary: tokens that have one."""

    blocks: Transformer
    context: int
    vocabulary: int

    keys = TOKENIZER_KEYS | {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
    }
    trim = "causal"
    pad_id = None  # it stands behind the end token, where it changes nothing
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
        if not text.keys() <= cls.keys:
            return None
        blocks = Transformer(
            "",
            text.get("width", 512),
            text.get("layers", 12),
            heads=text.get("heads", 8),
            mlp_ratio=text.get("mlp_ratio", 4.0),
            quick_gelu=config.get("quick_gelu", False),
        )
        return cls(
            blocks,
            context=text.get("context_length", 77),
            vocabulary=text.get("vocab_size", 49408),
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
        }
        if end not in (_OLD_END, vocabulary - 1):
            text |= {"pool_type": "eos", "eos_id": end}
        return {"text_cfg": text, "quick_gelu": saved_with_quick_gelu(saved)}

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        return {
            "token_embedding.weight": (self.vocabulary, width),
            "positional_embedding": (self.context, width),
            **norm_shapes("ln_final", width),
            "text_projection": (width, dim),
            **self.blocks.shapes(),
        }

    def build(self, graph: GraphBuilder, target: Target) -> str:
        layout = of_texts(graph) if target == "onnxruntime" else of_padded_texts(graph)
        table = graph.weight("token_embedding.weight")
        states = graph.lookup("token_embedding", table, layout.tokens)
        positions = graph.floats("positional_embedding", graph.weight("positional_embedding"))
        positions = graph.op("Gather", positions, layout.positions, name="positions.rows", axis=0)
        states = graph.op("Add", states, positions, name="states")

        mask = np.triu(np.full((self.context, self.context), -np.inf, dtype=np.float32), k=1)
        causal = slice_first(graph, graph.floats("causal_mask", mask), layout.length, axes=[0, 1])
        last = graph.op("Gather", causal, layout.ends, name="end.mask.rows", axis=0)
        last = graph.op("Unsqueeze", last, graph.integers(1, 2), name="end.mask")

        pooled = self.blocks.build(graph, states, layout, mask=causal, pooled_mask=last)
        pooled = graph.layer_norm(pooled, "ln_final")
        return graph.projection(pooled, "text_projection")
