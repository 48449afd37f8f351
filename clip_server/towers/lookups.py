"""Finds the tables of a graph that are read row by row, such as that of the token embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

# Operators whose results are values of their first input.
_SELECTING = {
    *("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze"),
    *("Transpose", "Unsqueeze"),
}


@dataclass(frozen=True)
class Lookup:
    """A table [V, W] of which a graph reads the rows that one of its inputs names, and no others.

    table, indices: names of the table and of the input. file, offset: where the table is stored.
    """

    table: str
    indices: str
    file: Path
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """The size of the table."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def find(path: Path) -> list[Lookup]:
    """The tables of the graph in a file that are stored outside of it and only looked up in."""
    graph = onnx.load(path, load_external_data=False).graph
    if any(_has_subgraph(node) for node in graph.node):  # which may read any table
        return []
    sources = {each.name: each.name for each in graph.input}
    read_by: dict[str, set[str | None]] = {}  # None: read in another way
    for node in graph.node:
        if node.op_type in _SELECTING and (source := sources.get(node.input[0])):
            sources.update(dict.fromkeys(node.output, source))
        for place, name in enumerate(node.input):
            is_table = place == 0 and _reads_rows(node)
            source = sources.get(node.input[1]) if is_table else None
            read_by.setdefault(name, set()).add(source)
    return [*_stored(graph, read_by, path.parent)]


def _reads_rows(node: onnx.NodeProto) -> bool:
    """Whether a node reads rows of its first input, at the numbers in its second."""
    axis = next((each.i for each in node.attribute if each.name == "axis"), 0)
    return node.op_type == "Gather" and axis == 0


def _stored(
    graph: onnx.GraphProto, read_by: dict[str, set[str | None]], folder: Path
) -> Iterator[Lookup]:
    for tensor in graph.initializer:
        inputs = read_by.get(tensor.name, set())
        if tensor.data_location != TensorProto.EXTERNAL or len(tensor.dims) != 2:
            continue
        if len(inputs) != 1 or None in inputs:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
        lookup = Lookup(
            tensor.name,
            str(*inputs),
            folder / entries["location"],
            int(entries.get("offset", 0)),
            (tensor.dims[0], tensor.dims[1]),
            dtype,
        )
        # Neither packed for other operators, nor of a type that numpy lacks.
        if int(entries.get("length", -1)) == lookup.nbytes and dtype.kind in "fiu":
            yield lookup


def _has_subgraph(node: onnx.NodeProto) -> bool:
    return any(each.type == onnx.AttributeProto.GRAPH for each in node.attribute)
