"""CoCa's text tower: causal, pooled at a class token that follows the text and its padding."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from clip_server.towers.clip_text import ClipText
from clip_server.towers.layout import Layout, every_nth
from clip_server.towers.tower import Config, Shapes, Target

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_OWN_KEYS = frozenset({"embed_cls", "output_tokens", "pad_id"})
_PAD_ID = 0


@dataclass(frozen=True)
class CocaText(ClipText):
    """As `ClipText`; the class token has a position behind the others."""

    keys = ClipText.keys | _OWN_KEYS

    @classmethod
    def from_config(cls, config: Config) -> CocaText | None:
        text = config["text_cfg"]
        if not text.get("embed_cls", False) or text.get("pad_id", _PAD_ID) != _PAD_ID:
            return None
        others = {key: value for key, value in text.items() if key not in _OWN_KEYS}
        found = ClipText.from_config({**config, "text_cfg": others})
        if found is None or not found.causal:
            return None
        values = {field.name: getattr(found, field.name) for field in fields(found)}
        return cls(**values | {"trim": "fixed"})

    def shapes(self, dim: int) -> Shapes:
        width = self.blocks.width
        positions = {"positional_embedding": (self.context + 1, width)}
        return {**super().shapes(dim), **positions, "cls_emb": (width,)}

    def macs(self, dim: int, length: int) -> int:
        return super().macs(dim, length + 1)

    def build(self, graph: GraphBuilder, target: Target) -> str:
        del target  # the same graph for all
        length = self.context + 1
        states = self._states(graph)
        present = self._mask_of_padding(graph)
        future = np.triu(np.full((length, length), -np.inf, dtype=np.float32), k=1)
        causal = graph.floats("causal_mask", future)
        mask = graph.op("Add", present, causal, name="mask")
        layout = Layout(graph.integers(length), every_nth(graph, length, start=self.context))
        pooled = self.blocks.build(graph, states, layout, mask=mask, pooled_mask=present)
        return self._projected(graph, pooled)

    def _states(self, graph: GraphBuilder) -> str:
        """The tokens and the class token with their positions: [B * (L + 1), W]."""
        width = self.blocks.width
        words = graph.lookup("token_embedding", graph.weight("token_embedding.weight"), "tokens")
        token = graph.floats("class_token", graph.weight("cls_emb").reshape(1, 1, width))
        batch = graph.op("Shape", "tokens", name="batch", start=0, end=1)
        shape = graph.op(
            "Concat", batch, graph.integers(1, width), name="class_token.shape", axis=0
        )
        token = graph.op("Expand", token, shape, name="class_tokens")
        words = graph.op("Concat", words, token, name="words", axis=1)
        positions = graph.floats("positional_embedding", graph.weight("positional_embedding"))
        states = graph.op("Add", words, positions, name="states")
        return graph.op("Reshape", states, graph.integers(-1, width), name="states.flat")

    def _mask_of_padding(self, graph: GraphBuilder) -> str:
        """Hides the position behind each padding token, [B, 1, 1, L + 1].

        That it is the one behind is an error that the checkpoints were trained with.
        """
        pad = graph.constant("pad_id", np.array(_PAD_ID, dtype=np.int32))
        padding = graph.op("Equal", "tokens", pad, name="padding")
        hidden = graph.floats("hidden", np.array(-np.inf, dtype=np.float32))
        mask = graph.op("Where", padding, hidden, graph.number(0), name="padding.mask")
        front = graph.integers(0, 1, 0, 0)  # a position more at the beginning of each row
        mask = graph.op("Pad", mask, front, name="padding.mask.moved")
        return graph.op("Unsqueeze", mask, graph.integers(1, 2), name="padding.mask.of_keys")
