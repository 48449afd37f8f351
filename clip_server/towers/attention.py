"""Multi-head attention in ONNX nodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clip_server.towers.layout import Layout

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_PARTS = ("query", "key", "value")


class Attention:
    """Multi-head attention. weight [3 W, W] and bias [3 W] project to query, key and value."""

    def __init__(
        self,
        graph: GraphBuilder,
        prefix: str,
        heads: int,
        weight: NDArray[np.float32],
        bias: NDArray[np.float32],
    ) -> None:
        self._graph, self._prefix = graph, prefix
        self._heads, self._width = heads, weight.shape[1]
        self._head_width = self._width // heads
        scale = np.ones(3 * self._width, dtype=np.float32)
        # Scaling the weights here avoids scaling the scores at every call.
        scale[: self._width] = self._head_width**-0.5
        self._weight, self._bias = weight * scale[:, np.newaxis], bias * scale

    @classmethod
    def of_linears(
        cls, graph: GraphBuilder, prefix: str, heads: int, names: Sequence[str]
    ) -> Attention:
        """Attention whose query, key and value are Linear layers of the checkpoint, by name."""
        weight = np.concatenate([graph.weight(f"{name}.weight") for name in names])
        bias = np.concatenate([graph.weight(f"{name}.bias") for name in names])
        return cls(graph, prefix, heads, weight, bias)

    def project_all(self, states: str, layout: Layout) -> list[str]:
        """Query, key and value of every position, each [B, H, L, W / H]."""
        qkv = self._graph.linear(states, f"{self._prefix}.qkv", self._weight, self._bias)
        spread = layout.spread(qkv)
        return split_heads(self._graph, spread, layout.length, self._heads, _PARTS, self._width)

    def project_pooled(self, pooled: str, states: str, layout: Layout) -> list[str]:
        """As `project_all`, but queries of the pooled positions only: [B, H, 1, W / H]."""
        width = self._width
        weight, bias = self._weight, self._bias
        query = self._graph.linear(pooled, f"{self._prefix}.q", weight[:width], bias[:width])
        shape = self._graph.integers(-1, self._heads, 1, self._head_width)
        query = self._graph.op("Reshape", query, shape, name=f"{self._prefix}.query")
        kv = self._graph.linear(states, f"{self._prefix}.kv", weight[width:], bias[width:])
        spread = layout.spread(kv)
        keys = split_heads(self._graph, spread, layout.length, self._heads, _PARTS[1:], self._width)
        return [query, *keys]

    def attend(self, query: str, key: str, value: str, mask: str | None) -> str:
        """As the function `attend`: [B * Q, W]."""
        return attend(self._graph, self._prefix, query, key, value, self._width, mask)


def split_heads(
    graph: GraphBuilder, rows: str, length: str, heads: int, parts: Sequence[str], width: int
) -> list[str]:
    """Rows [B * L, n * W] to n parts of [B, H, L, W / H].

    length: L, int64 [1]. parts: their names. width: W.
    """
    per_head = graph.integers(len(parts) * heads, width // heads)
    shape = graph.op("Concat", graph.integers(-1), length, per_head, name=f"{rows}.shape", axis=0)
    rows = graph.op("Reshape", rows, shape, name=f"{rows}.by_head")
    rows = graph.op("Transpose", rows, name=f"{rows}.first", perm=[0, 2, 1, 3])
    return graph.split(rows, parts, axis=1) if len(parts) > 1 else [rows]


def attend(
    graph: GraphBuilder,
    prefix: str,
    query: str,
    key: str,
    value: str,
    width: int,
    mask: str | None = None,
) -> str:
    """Attention of scaled queries [B, H, Q, d], or [1, H, Q, d], over [B, H, L, d]: [B * Q, W].

    mask: added to the scores [B, H, Q, L].
    """
    key = graph.op("Transpose", key, name=f"{key}.columns", perm=[0, 1, 3, 2])
    scores = graph.op("MatMul", query, key, name=f"{prefix}.scores")
    if mask is not None:
        scores = graph.op("Add", scores, mask, name=f"{prefix}.scores.masked")
    shares = graph.softmax(scores, f"{prefix}.shares")
    mixed = graph.op("MatMul", shares, value, name=f"{prefix}.mixed")
    mixed = graph.op("Transpose", mixed, name=f"{prefix}.mixed.rows", perm=[0, 2, 1, 3])
    return graph.op("Reshape", mixed, graph.integers(-1, width), name=f"{prefix}.heads")


def attend_from(
    graph: GraphBuilder,
    prefix: str,
    query: NDArray[np.float32],
    kv: tuple[NDArray[np.float32], NDArray[np.float32]],
    states: str,
    length: int,
    heads: int,
) -> str:
    """Attention of one query that is the same for every item over its states [B * L, I]: [B, W].

    query: [W], projected. kv: weight [2 W, I] and bias [2 W] of keys and values.
    """
    width = len(query)
    scaled = (query * (width // heads) ** -0.5).reshape(1, heads, 1, -1)
    rows = graph.linear(states, f"{prefix}.kv", *kv)
    key, value = split_heads(graph, rows, graph.integers(length), heads, _PARTS[1:], width)
    return attend(graph, prefix, graph.floats(f"{prefix}.query", scaled), key, value, width)


def slice_first(graph: GraphBuilder, table: str, length: str, axes: Sequence[int]) -> str:
    """The first `length` entries of a constant along `axes`."""
    starts, ends = graph.integers(*(0 for _ in axes)), length
    if len(axes) > 1:
        ends = graph.op("Concat", *(length for _ in axes), name=f"{table}.ends", axis=0)
    return graph.op("Slice", table, starts, ends, graph.integers(*axes), name=f"{table}.head")
