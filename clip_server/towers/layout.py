"""Layouts: which positions of a batch a transformer computes, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from clip_server.towers.builder import GraphBuilder

_NO_TOKEN = -1
# Rows [N, W] to those that become the embeddings, [B, W].
Pool = Callable[[str], str]
# The position of a text that becomes its embedding: that of the largest id, which is the end
# token's in CLIP's vocabulary; the first of a certain id; or the last, padding included.
End = Literal["largest", "last"] | int


def _as_they_are(rows: str) -> str:
    return rows


@dataclass(frozen=True)
class Layout:
    """N rows for the L positions of each of B items. Everything except attention works on rows.

    length: L, int64 [1].
    pool: as `Pool`; None where the tower pools after its blocks.
    spread: rows [N, W] to every position, [B * L, W].
    gather: every position [B * L, W] to rows, [N, W].
    """

    length: str
    pool: Pool | None = None
    spread: Callable[[str], str] = _as_they_are
    gather: Callable[[str], str] = _as_they_are


@dataclass(frozen=True, kw_only=True)
class TextLayout(Layout):
    """The rows of texts. tokens, positions: of each row, [N]; ends: of each text's end, [B]."""

    tokens: str
    positions: str
    ends: str


def every_nth(graph: GraphBuilder, length: int, start: int = 0) -> Pool:
    """Takes one of the `length` positions of each item, the first or that at `start`."""

    def taken(rows: str) -> str:
        first, end, axis = graph.integers(start), graph.integers(2**63 - 1), graph.integers(0)
        return graph.op(
            "Slice", rows, first, end, axis, graph.integers(length), name=f"{rows}.pooled"
        )

    return taken


def of_first_positions(graph: GraphBuilder, length: int) -> Layout:
    """Images: every position; the first becomes the embedding."""
    return Layout(graph.integers(length), every_nth(graph, length))


def of_all_positions(graph: GraphBuilder, length: int) -> Layout:
    """Images: every position; the tower pools after its blocks."""
    return Layout(graph.integers(length))


def of_texts(graph: GraphBuilder, end: End) -> TextLayout:
    """Texts of `tokens` [B, L] in a causal tower: every position that matters, computed once.

    end: the position that becomes the embedding. What follows it is padding.

    Left out are padding, and the beginning that a text shares with the one before it, for which a
    causal tower computes the same states. So the start token is computed once for the whole batch.
    Any order of the texts gives the same embeddings; sorted texts share the most.
    """
    op, flat = graph.op, graph.integers(-1)
    batch, length = _shape(graph)
    ends, ends_flat = _ends(graph, end)

    # Counted position by position, a position that is left out comes right after the row that it
    # shares, which is that of the same position in an earlier text.
    computed = op("And", _begins_otherwise(graph), _is_text(graph, length, ends), name="computed")
    computed = op("Transpose", computed, name="computed.by_position", perm=[1, 0])
    computed = op("Reshape", computed, flat, name="computed.flat")
    chosen = op("Reshape", op("NonZero", computed, name="chosen.found"), flat, name="chosen")
    counted = graph.cast(computed, np.int64, "computed.ones")
    counted = op("CumSum", counted, graph.integers(0), name="computed.count")
    row = op("Sub", counted, graph.integers(1), name="row.flat")
    by_position = op("Concat", length, flat, name="by_position", axis=0)
    row = op("Reshape", row, by_position, name="row.by_position")
    row = op("Reshape", op("Transpose", row, name="row.by_text", perm=[1, 0]), flat, name="row")

    positions = op("Div", chosen, batch, name="positions")
    place = op("Mul", op("Mod", chosen, batch, name="texts"), length, name="texts.start")
    place = op("Add", place, positions, name="place")
    tokens = op("Reshape", "tokens", flat, name="tokens.flat")

    end_row = op("Gather", row, _end_places(graph, batch, length, ends_flat), name="end.row")
    return TextLayout(
        length,
        pool=_gathering(graph, end_row, "end"),
        spread=_gathering(graph, row, "everywhere"),
        gather=_gathering(graph, place, "once"),
        tokens=op("Gather", tokens, place, name="tokens.once"),
        positions=positions,
        ends=ends_flat,
    )


def of_padded_texts(graph: GraphBuilder, end: End) -> TextLayout:
    """Texts of `tokens` [B, L]: every position, padding included.

    In a causal tower more is computed than in `of_texts`, but no shape depends on the content of
    the texts, as compilers for GPUs require.

    end: the position that becomes the embedding.
    """
    op, flat = graph.op, graph.integers(-1)
    batch, length = _shape(graph)
    if end == "last":
        last = op("Sub", length, graph.integers(1), name="last")
        ends = op("Expand", last, batch, name="ends.flat")
    else:
        _, ends = _ends(graph, end)
    shape = op("Concat", batch, length, name="tokens.shape", axis=0)
    positions = op("Expand", _range(graph, length, "position"), shape, name="positions.by_text")
    return TextLayout(
        length,
        pool=_gathering(graph, _end_places(graph, batch, length, ends), "end"),
        tokens=op("Reshape", "tokens", flat, name="tokens.flat"),
        positions=op("Reshape", positions, flat, name="positions"),
        ends=ends,
    )


def _shape(graph: GraphBuilder) -> tuple[str, str]:
    """B and L of `tokens`, each int64 [1]."""
    batch = graph.op("Shape", "tokens", name="batch", start=0, end=1)
    return batch, graph.op("Shape", "tokens", name="length", start=1, end=2)


def _ends(graph: GraphBuilder, end: End) -> tuple[str, str]:
    """The position of each text's end token, [B, 1] and [B]."""
    tokens = "tokens"
    if end != "largest":
        token = graph.constant("end_token", np.array(end, dtype=np.int32))
        tokens = graph.op("Equal", tokens, token, name="tokens.are_end")
        tokens = graph.cast(tokens, np.int32, "tokens.are_end.ones")
    ends = graph.op("ArgMax", tokens, name="ends", axis=1, keepdims=1)
    return ends, graph.op("Squeeze", ends, graph.integers(1), name="ends.flat")


def _end_places(graph: GraphBuilder, batch: str, length: str, ends: str) -> str:
    """The index of each end token, at `ends` [B], among the B * L positions: [B]."""
    starts = graph.op("Mul", _range(graph, batch, "text"), length, name="text.start")
    return graph.op("Add", starts, ends, name="end.place")


def _gathering(graph: GraphBuilder, places: str, kind: str) -> Callable[[str], str]:
    return lambda rows: graph.op("Gather", rows, places, name=f"{rows}.{kind}", axis=0)


def _begins_otherwise(graph: GraphBuilder) -> str:
    """Whether a text, up to and including a position, differs from the one before it: [B, L]."""
    shift = graph.integers(1, 0, -1, 0)  # one row more at the front, one less at the end
    no_token = graph.constant("no_token", np.array(_NO_TOKEN, dtype=np.int32))
    before = graph.op("Pad", "tokens", shift, no_token, name="tokens.before")
    same = graph.op("Equal", "tokens", before, name="tokens.same")
    differs = graph.op("Not", same, name="tokens.differ")
    differs = graph.cast(differs, np.int32, "tokens.differ.ones")
    differs = graph.op("CumSum", differs, graph.integers(1), name="tokens.differ.count")
    return graph.cast(differs, np.bool_, "tokens.fresh")


def _is_text(graph: GraphBuilder, length: str, ends: str) -> str:
    """Whether a position comes before a text's padding: [B, L]."""
    return graph.op("LessOrEqual", _range(graph, length, "position"), ends, name="tokens.of_text")


def _range(graph: GraphBuilder, count: str, name: str) -> str:
    """0 .. count - 1, for a count int64 [1]."""
    count = graph.op("Squeeze", count, name=f"{name}.count")
    zero, one = (graph.constant(f"i64({n})", np.array(n, dtype=np.int64)) for n in (0, 1))
    return graph.op("Range", zero, count, one, name=name)
