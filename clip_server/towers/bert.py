"""BERT as a text tower: Chinese-CLIP's, M-CLIP's, and open_clip's RoBERTa and XLM-RoBERTa.

Unlike CLIP's own, a block normalises after it adds, every position sees every other that is not
padding, and an embedding is that of the first position or the mean over all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clip_server.errors import ConfigurationError
from clip_server.towers.attention import Attention, slice_first
from clip_server.towers.layout import Layout
from clip_server.towers.tower import (
    TOKENIZER_KEYS,
    Config,
    Shapes,
    Target,
    TextSavedByTransformers,
    TextTower,
    linear_shapes,
    norm_shapes,
    transformer_macs,
)

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

# Added to the attention scores of padding.
_MASKED = -10000.0
# The number of tokens that Chinese-CLIP was trained with; it has positions for more.
_CHINESE_CONTEXT = 52

# The towers that `hf_model_name` may name.
_BASE: dict[str, Any] = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
_HUGGING_FACE: dict[str, dict[str, Any]] = {
    "roberta-base": _BASE | {"vocab_size": 50265},
    "xlm-roberta-base": _BASE | {"vocab_size": 250002},
    "xlm-roberta-large": {
        "width": 1024,
        "layers": 24,
        "heads": 16,
        "mlp_width": 4096,
        "vocab_size": 250002,
    },
}


@dataclass(frozen=True)
class BertText(TextTower):
    """The fields are those of `bert` in `text_cfg`.

    prefix: of the tensors in a checkpoint.
    mlp_width: of the hidden layer in a block.
    positions: that have embeddings; the first token stands at `first_position`.
    types: of tokens; ours are all of the first.
    pool: what becomes the embedding: the first position, or the mean over all.
    projection: the tensor [width, dim], or the Linear with a bias, that ends the tower; or the MLP
        of two Linear layers without a bias.
    """

    width: int
    layers: int
    heads: int
    mlp_width: int
    vocab_size: int
    positions: int = 512
    first_position: int = 0
    types: int = 2
    pad_id: int = 0
    epsilon: float = 1e-12
    pool: Literal["first", "mean"] = "first"
    prefix: str = "bert."
    projection: str = "text_projection"
    projection_bias: bool = False
    projection_mlp: bool = False

    keys = TOKENIZER_KEYS | {
        *("bert", "context_length", "vocab_size", "vocabulary"),
        *("hf_model_name", "hf_pooler_type", "hf_proj_type"),
    }
    # BERT's own pooling, in Chinese-CLIP's checkpoints and in M-CLIP's.
    unused = ("bert.pooler.", "transformer.pooler.")
    trim = "masked"
    torch_module = "clip_server.runtimes.torch_bert:BertTextTower"
    saved = TextSavedByTransformers(
        model_types=("chinese_clip",),
        defaults={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "vocab_size": 30522,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "type_vocab_size": 2,
            "pad_token_id": 0,
        },
        prefixes={"text_model.": "bert."},
        transposed={"text_projection.weight": "text_projection"},
        vocabulary="chinese-bert",
        resize="squash",
    )

    @property
    def max_length(self) -> int:
        return self.positions - self.first_position

    @classmethod
    def from_config(cls, config: Config) -> BertText | None:
        text = config["text_cfg"]
        if "bert" not in text:
            return _of_hugging_face(text) if text.keys() <= cls.keys else None
        described = text["bert"]
        known = {field.name: field for field in fields(cls)}
        required = {name for name, field in known.items() if field.default is MISSING}
        if unknown := sorted(described.keys() - known.keys()):
            raise ConfigurationError(
                f"bert in text_cfg has the unknown {', '.join(unknown)}: "
                f"known are {', '.join(known)}"
            )
        if missing := sorted(required - described.keys()):
            raise ConfigurationError(f"bert in text_cfg lacks {', '.join(missing)}")
        return cls(**described)

    @classmethod
    def from_transformers(cls, saved: Mapping[str, Any]) -> dict[str, Any]:
        if saved["hidden_act"] != "gelu":
            raise ConfigurationError(f"hidden_act {saved['hidden_act']!r} of a BERT: only gelu")
        bert = {
            "width": saved["hidden_size"],
            "layers": saved["num_hidden_layers"],
            "heads": saved["num_attention_heads"],
            "mlp_width": saved["intermediate_size"],
            "vocab_size": saved["vocab_size"],
            "positions": saved["max_position_embeddings"],
            "types": saved["type_vocab_size"],
            "pad_id": saved["pad_token_id"],
            "epsilon": saved["layer_norm_eps"],
        }
        text = {"context_length": _CHINESE_CONTEXT, "vocab_size": saved["vocab_size"], "bert": bert}
        return {"text_cfg": text}

    def shapes(self, dim: int) -> Shapes:
        width, embeddings = self.width, f"{self.prefix}embeddings."
        shapes: Shapes = {
            f"{embeddings}word_embeddings.weight": (self.vocab_size, width),
            f"{embeddings}position_embeddings.weight": (self.positions, width),
            f"{embeddings}token_type_embeddings.weight": (self.types, width),
            **norm_shapes(f"{embeddings}LayerNorm", width),
        }
        for index in range(self.layers):
            shapes |= self._block_shapes(self.block(index))
        if self.projection_bias:
            return shapes | linear_shapes(self.projection, width, dim)
        if self.projection_mlp:
            first, second = self.projection_layers
            hidden = (width + dim) // 2
            return shapes | {first: (hidden, width), second: (dim, hidden)}
        return shapes | {self.projection: (width, dim)}

    @property
    def projection_layers(self) -> tuple[str, str]:
        """The weights of the MLP that ends the tower."""
        return f"{self.projection}.0.weight", f"{self.projection}.2.weight"

    def block(self, index: int) -> str:
        """The prefix of a block's tensors."""
        return f"{self.prefix}encoder.layer.{index}."

    def attention(self, index: int) -> tuple[str, str, str]:
        """The names of the Linear layers for query, key and value in a block."""
        prefix = f"{self.block(index)}attention.self."
        return f"{prefix}query", f"{prefix}key", f"{prefix}value"

    def _block_shapes(self, block: str) -> Shapes:
        width = self.width
        return {
            **linear_shapes(f"{block}attention.self.query", width, width),
            **linear_shapes(f"{block}attention.self.key", width, width),
            **linear_shapes(f"{block}attention.self.value", width, width),
            **linear_shapes(f"{block}attention.output.dense", width, width),
            **norm_shapes(f"{block}attention.output.LayerNorm", width),
            **linear_shapes(f"{block}intermediate.dense", width, self.mlp_width),
            **linear_shapes(f"{block}output.dense", self.mlp_width, width),
            **norm_shapes(f"{block}output.LayerNorm", width),
        }

    def macs(self, dim: int, length: int) -> int:
        blocks = transformer_macs(self.width, self.mlp_width, self.layers, length)
        hidden = (self.width + dim) // 2
        end = hidden * (self.width + dim) if self.projection_mlp else self.width * dim
        return blocks + end

    def build(self, graph: GraphBuilder, target: Target) -> str:
        del target  # the same graph for all
        length = graph.op("Shape", "tokens", name="length", start=1, end=2)
        present = present_tokens(graph, self.pad_id)
        mask = padding_mask(graph, present)
        states = self._embeddings(graph, length)
        layout = Layout(length)
        for index in range(self.layers - 1):
            states = self._build_block(graph, index, states, layout, mask)
        if self.pool == "first":
            layout = Layout(length, lambda rows: first_positions(graph, rows, length, self.width))
        states = self._build_block(graph, self.layers - 1, states, layout, mask)
        if self.pool == "mean":
            states = self._mean(graph, states, length, present)
        if self.projection_bias:
            return graph.stored_linear(states, self.projection)
        if self.projection_mlp:
            first, second = (graph.weight(name).T for name in self.projection_layers)
            states = graph.product(states, f"{self.projection}.hidden", first)
            states = graph.gelu(states, f"{self.projection}.gelu")
            return graph.product(states, self.projection, second)
        return graph.projection(states, self.projection)

    def _embeddings(self, graph: GraphBuilder, length: str) -> str:
        """Tokens with their positions, normalised: [B * L, W]."""
        prefix = f"{self.prefix}embeddings."
        table = graph.weight(f"{prefix}word_embeddings.weight")
        words = graph.lookup(f"{prefix}word_embeddings", table, "tokens")
        places = graph.weight(f"{prefix}position_embeddings.weight")[self.first_position :]
        kind = graph.weight(f"{prefix}token_type_embeddings.weight")[0]
        positions = graph.floats(f"{prefix}position_embeddings", places + kind)
        positions = slice_first(graph, positions, length, axes=[0])
        states = graph.op("Add", words, positions, name="tokens.placed")
        states = graph.op("Reshape", states, graph.integers(-1, self.width), name="tokens.flat")
        return graph.layer_norm(states, f"{prefix}LayerNorm", epsilon=self.epsilon)

    def _build_block(
        self, graph: GraphBuilder, index: int, states: str, layout: Layout, mask: str
    ) -> str:
        """One block: states [B * L, W] to the same, or only to the pooled ones, [B, W]."""
        block, names = self.block(index), self.attention(index)
        attention = Attention.of_linears(graph, f"{block}attention.self", self.heads, names)
        if layout.pool is not None:
            pooled = layout.pool(states)
            query, key, value = attention.project_pooled(pooled, states, layout)
            states = pooled
        else:
            query, key, value = attention.project_all(states, layout)
        attended = attention.attend(query, key, value, mask)
        attended = graph.stored_linear(attended, f"{block}attention.output.dense")
        states = self._added(graph, states, attended, f"{block}attention.output")
        hidden = graph.stored_linear(states, f"{block}intermediate.dense")
        hidden = graph.gelu(hidden, f"{block}intermediate.gelu")
        hidden = graph.stored_linear(hidden, f"{block}output.dense")
        return self._added(graph, states, hidden, f"{block}output")

    def _added(self, graph: GraphBuilder, states: str, change: str, name: str) -> str:
        states = graph.op("Add", states, change, name=f"{name}.sum")
        return graph.layer_norm(states, f"{name}.LayerNorm", epsilon=self.epsilon)

    def _mean(self, graph: GraphBuilder, states: str, length: str, present: str) -> str:
        """The mean over the positions of each text that are not padding: [B, W]."""
        texts = _by_text(graph, states, length, self.width)
        weights = graph.op("Unsqueeze", present, graph.integers(1), name="present.row")
        summed = graph.op("MatMul", weights, texts, name="tokens.summed")
        summed = graph.op("Reshape", summed, graph.integers(-1, self.width), name="texts.summed")
        axis = graph.integers(1)
        count = graph.op("ReduceSum", present, axis, name="tokens.count", keepdims=1)
        return graph.op("Div", summed, count, name="texts.mean")


def _of_hugging_face(text: Mapping[str, Any]) -> BertText | None:
    """The tower that open_clip takes from transformers, by its name; None if it is not known."""
    size = _HUGGING_FACE.get(text.get("hf_model_name", ""))
    end = text.get("hf_pooler_type", "mean_pooler"), text.get("hf_proj_type", "mlp")
    if size is None or end != ("mean_pooler", "mlp"):
        return None
    return BertText(
        **size,
        positions=514,
        first_position=2,
        types=1,
        pad_id=1,
        epsilon=1e-5,
        pool="mean",
        prefix="transformer.",
        projection="proj",
        projection_mlp=True,
    )


def present_tokens(graph: GraphBuilder, pad_id: int) -> str:
    """1.0 for tokens and 0.0 for padding: [B, L]."""
    pad = graph.constant("pad_id", np.array(pad_id, dtype=np.int32))
    padding = graph.op("Equal", "tokens", pad, name="padding")
    tokens = graph.op("Not", padding, name="present")
    return graph.as_computed(graph.cast(tokens, np.float32, "present.float"))


def padding_mask(graph: GraphBuilder, present: str) -> str:
    """Added to attention scores: [B, 1, 1, L]."""
    missing = graph.op("Sub", present, graph.number(1), name="padding.float")
    mask = graph.op("Mul", missing, graph.number(-_MASKED), name="padding.mask")
    return graph.op("Unsqueeze", mask, graph.integers(1, 2), name="mask")


def first_positions(graph: GraphBuilder, states: str, length: str, width: int) -> str:
    """The first position of each text, of states [B * L, W]: [B, W]."""
    texts = _by_text(graph, states, length, width)
    first = graph.constant("first", np.array(0, dtype=np.int64))
    return graph.op("Gather", texts, first, name=f"{states}.first", axis=1)


def _by_text(graph: GraphBuilder, states: str, length: str, width: int) -> str:
    """[B * L, W] to [B, L, W]."""
    batch, last = graph.integers(-1), graph.integers(width)
    shape = graph.op("Concat", batch, length, last, name=f"{states}.shape", axis=0)
    return graph.op("Reshape", states, shape, name=f"{states}.by_text")
