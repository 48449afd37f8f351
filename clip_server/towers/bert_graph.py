"""The ONNX graph of a BERT that is a text tower (see `bert`)."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from clip_server.towers.attention import Attention, head
from clip_server.towers.bert import MASKED, BertTower
from clip_server.towers.layout import Layout
from clip_server.towers.nodes import Graph


def text_transformer(graph: Graph, tower: BertTower) -> str:
    """The tower from `tokens` int32 [B, L] to embeddings [B, D]."""
    length = graph.op("Shape", "tokens", name="length", start=1, end=2)
    present = _present(graph, tower)
    mask = _mask(graph, present)
    states = _embedded(graph, tower, length)
    layout = Layout(length, pick=lambda rows: _firsts(graph, tower, rows, length))
    for index in range(tower.layers):
        pool = tower.pool == "first" and index == tower.layers - 1
        states = _block(graph, tower, index, states, layout, mask, pool=pool)
    if tower.pool == "mean":
        states = _mean(graph, tower, states, length, present)
    if tower.projection_bias:
        return graph.stored_linear(states, tower.projection)
    return graph.projection(states, tower.projection)


def _present(graph: Graph, tower: BertTower) -> str:
    """1.0 where there is a token and 0.0 where there is padding: [B, L]."""
    pad = graph.constant("pad_id", np.array(tower.pad_id, dtype=np.int32))
    padding = graph.op("Equal", "tokens", pad, name="padding")
    tokens = graph.op("Not", padding, name="present")
    return graph.computed(graph.cast(tokens, TensorProto.FLOAT, "present.float"))


def _mask(graph: Graph, present: str) -> str:
    """What is added to attention scores: [B, 1, 1, L]."""
    missing = graph.op("Sub", present, graph.number(1), name="padding.float")
    mask = graph.op("Mul", missing, graph.number(-MASKED), name="padding.mask")
    return graph.op("Unsqueeze", mask, graph.integers(1, 2), name="mask")


def _embedded(graph: Graph, tower: BertTower, length: str) -> str:
    """Tokens with their positions, normalised: [B * L, W]."""
    prefix = f"{tower.prefix}embeddings."
    table = graph.weight(f"{prefix}word_embeddings.weight")
    words = graph.lookup(f"{prefix}word_embeddings", table, "tokens")
    places = graph.weight(f"{prefix}position_embeddings.weight")[tower.first_position :]
    kind = graph.weight(f"{prefix}token_type_embeddings.weight")[0]
    positions = graph.floats(f"{prefix}position_embeddings", places + kind)
    positions = head(graph, positions, length, axes=[0])
    states = graph.op("Add", words, positions, name="tokens.placed")
    states = graph.op("Reshape", states, graph.integers(-1, tower.width), name="tokens.flat")
    return graph.layer_norm(states, f"{prefix}LayerNorm", epsilon=tower.epsilon)


def _block(
    graph: Graph,
    tower: BertTower,
    index: int,
    states: str,
    layout: Layout,
    mask: str,
    *,
    pool: bool,
) -> str:
    """One block: states [B * L, W] to the same, or only to the picked ones, [B, W]."""
    block, names = tower.block(index), tower.attention(index)
    weight = np.concatenate([graph.weight(f"{name}.weight") for name in names])
    bias = np.concatenate([graph.weight(f"{name}.bias") for name in names])
    attention = Attention(graph, f"{block}attention.self", tower.heads, weight, bias)
    if pool:
        picked = layout.pick(states)
        query, key, value = attention.project_picked(picked, states, layout)
        states = picked
    else:
        query, key, value = attention.project_all(states, layout)
    attended = attention.attend(query, key, value, mask)
    attended = graph.stored_linear(attended, f"{block}attention.output.dense")
    states = _added(graph, tower, states, attended, f"{block}attention.output")
    hidden = graph.stored_linear(states, f"{block}intermediate.dense")
    hidden = graph.gelu(hidden, f"{block}intermediate.gelu")
    hidden = graph.stored_linear(hidden, f"{block}output.dense")
    return _added(graph, tower, states, hidden, f"{block}output")


def _added(graph: Graph, tower: BertTower, states: str, change: str, name: str) -> str:
    states = graph.op("Add", states, change, name=f"{name}.sum")
    return graph.layer_norm(states, f"{name}.LayerNorm", epsilon=tower.epsilon)


def _by_text(graph: Graph, tower: BertTower, states: str, length: str) -> str:
    """[B * L, W] to [B, L, W]."""
    batch, width = graph.integers(-1), graph.integers(tower.width)
    shape = graph.op("Concat", batch, length, width, name=f"{states}.shape", axis=0)
    return graph.op("Reshape", states, shape, name=f"{states}.by_text")


def _firsts(graph: Graph, tower: BertTower, states: str, length: str) -> str:
    """The first position of each text: [B, W]."""
    texts = _by_text(graph, tower, states, length)
    first = graph.constant("first", np.array(0, dtype=np.int64))
    return graph.op("Gather", texts, first, name=f"{states}.first", axis=1)


def _mean(graph: Graph, tower: BertTower, states: str, length: str, present: str) -> str:
    """The mean over the positions of each text that are no padding: [B, W]."""
    texts = _by_text(graph, tower, states, length)
    weights = graph.op("Unsqueeze", present, graph.integers(1), name="present.row")
    summed = graph.op("MatMul", weights, texts, name="tokens.summed")
    summed = graph.op("Reshape", summed, graph.integers(-1, tower.width), name="texts.summed")
    axis = graph.integers(1)
    count = graph.op("ReduceSum", present, axis, name="tokens.count", keepdims=1)
    return graph.op("Div", summed, count, name="texts.mean")
