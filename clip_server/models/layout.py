"""Which positions of its batch a transformer computes, and how their rows lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from clip_server.models.nodes import Graph

_NO_TOKEN = -1


def _as_they_are(rows: str) -> str:
    return rows


@dataclass(frozen=True)
class Layout:
    """N rows, for the L positions of each of B items. All but attention is computed on rows.

    length: L, int64 [1].
    pick: rows [N, W] to those that become the embeddings, [B, W].
    spread: rows [N, W] to every position, [B * L, W].
    gather: every position [B * L, W] to rows, [N, W].
    """

    length: str
    pick: Callable[[str], str] = _as_they_are
    spread: Callable[[str], str] = _as_they_are
    gather: Callable[[str], str] = _as_they_are


@dataclass(frozen=True)
class TextLayout(Layout):
    """The rows of texts. tokens, positions: of each row, [N]; ends: of each text's end, [B]."""

    tokens: str = ""
    positions: str = ""
    ends: str = ""


def of_first_positions(graph: Graph, length: int) -> Layout:
    """Images: every position; the first becomes the embedding."""

    def pick(rows: str) -> str:
        start, end, axis = graph.integers(0), graph.integers(2**63 - 1), graph.integers(0)
        return graph.op(
            "Slice", rows, start, end, axis, graph.integers(length), name=f"{rows}.first"
        )

    return Layout(graph.integers(length), pick)


def of_texts(graph: Graph) -> TextLayout:
    """Texts of `tokens` [B, L] in a causal tower: no position that cannot count, none twice.

    Left out are a text's padding, and what a text begins alike with the one before it: a causal
    tower makes the same of it. So the start token is computed once for the whole batch. Any
    order of the texts gives the same vectors; sorted ones share the most.
    """
    op, flat = graph.op, graph.integers(-1)
    batch = op("Shape", "tokens", name="batch", start=0, end=1)
    length = op("Shape", "tokens", name="length", start=1, end=2)
    # The end token has the largest id of the vocabulary.
    ends = op("ArgMax", "tokens", name="ends", axis=1, keepdims=1)

    # Counted position by position, a place that is left out comes right after the row that it
    # shares, which is the row of the same position in a text further up.
    computed = op("And", _begins_otherwise(graph), _is_text(graph, length, ends), name="computed")
    computed = op("Transpose", computed, name="computed.by_position", perm=[1, 0])
    computed = op("Reshape", computed, flat, name="computed.flat")
    chosen = op("Reshape", op("NonZero", computed, name="chosen.found"), flat, name="chosen")
    counted = op("Cast", computed, name="computed.ones", to=TensorProto.INT64)
    counted = op("CumSum", counted, graph.integers(0), name="computed.count")
    row = op("Sub", counted, graph.integers(1), name="row.flat")
    by_position = op("Concat", length, flat, name="by_position", axis=0)
    row = op("Reshape", row, by_position, name="row.by_position")
    row = op("Reshape", op("Transpose", row, name="row.by_text", perm=[1, 0]), flat, name="row")

    positions = op("Div", chosen, batch, name="positions")
    place = op("Mul", op("Mod", chosen, batch, name="texts"), length, name="texts.start")
    place = op("Add", place, positions, name="place")
    tokens = op("Reshape", "tokens", flat, name="tokens.flat")

    end = op("Squeeze", ends, graph.integers(1), name="ends.flat")
    end_row = op("Mul", _range(graph, batch, "text"), length, name="text.start")
    end_row = op("Gather", row, op("Add", end_row, end, name="end.place"), name="end.row")

    def gathering(places: str, kind: str) -> Callable[[str], str]:
        return lambda rows: op("Gather", rows, places, name=f"{rows}.{kind}", axis=0)

    return TextLayout(
        length,
        pick=gathering(end_row, "end"),
        spread=gathering(row, "everywhere"),
        gather=gathering(place, "once"),
        tokens=op("Gather", tokens, place, name="tokens.once"),
        positions=positions,
        ends=end,
    )


def _begins_otherwise(graph: Graph) -> str:
    """Whether a text, up to and with a position, differs from the text before it: [B, L]."""
    shift = graph.integers(1, 0, -1, 0)  # a row more in front, a row less at the end
    no_token = graph.constant("no_token", np.array(_NO_TOKEN, dtype=np.int32))
    before = graph.op("Pad", "tokens", shift, no_token, name="tokens.before")
    same = graph.op("Equal", "tokens", before, name="tokens.same")
    differs = graph.op("Not", same, name="tokens.differ")
    differs = graph.op("Cast", differs, name="tokens.differ.ones", to=TensorProto.INT32)
    differs = graph.op("CumSum", differs, graph.integers(1), name="tokens.differ.count")
    return graph.op("Cast", differs, name="tokens.fresh", to=TensorProto.BOOL)


def _is_text(graph: Graph, length: str, ends: str) -> str:
    """Whether a position comes before a text's padding: [B, L]."""
    return graph.op("LessOrEqual", _range(graph, length, "position"), ends, name="tokens.of_text")


def _range(graph: Graph, count: str, name: str) -> str:
    """0 .. count - 1, for a count int64 [1]."""
    count = graph.op("Squeeze", count, name=f"{name}.count")
    zero, one = (graph.constant(f"i64({n})", np.array(n, dtype=np.int64)) for n in (0, 1))
    return graph.op("Range", zero, count, one, name=name)
