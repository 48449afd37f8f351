"""The matrix products of a finished float32 graph, in float16 or int8.

For graphs that torch wrote, whatever their architecture. What is not a product stays in float32,
layer norm and softmax with it, and so do the inputs and the outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clip_server.models.card import Precision
from clip_server.models.nodes import KINDS, Graph

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def rewritten(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """A float32 model in a precision.

    fp16: products, of weights or of activations, and weights in float16.
    int8: products by a matrix of weights in integers, as `quantize` has them; tables in
        float16; convolutions and products of activations stay in float32.
    """
    if precision == "fp32":
        return model
    target = KINDS[precision](model.graph.name)
    rewriting = (_Halving if precision == "fp16" else _Quantizing)(model, target)
    return rewriting.run()


class _Rewriting:
    """Copies a model node by node; subclasses say which nodes are replaced, and by what."""

    def __init__(self, model: onnx.ModelProto, target: Graph) -> None:
        self._model, self._target = model, target
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def run(self) -> onnx.ModelProto:
        """The new model."""
        for node in self._model.graph.node:
            if self._is_table(node):
                self._look_up(node)
            elif not self.replaced(node):
                self._copy(node)
        return self._target.closed(self._model.graph.input, self._model.graph.output)

    def replaced(self, node: onnx.NodeProto) -> bool:
        """Adds what stands for a node, if anything does."""
        raise NotImplementedError

    def _copy(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in self._weights:
                self._target.constant(name, numpy_helper.to_array(self._weights[name]))
        self._target.copy(node)

    def _is_table(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Gather" and self._matrix(node.input[0]) is not None

    def _look_up(self, node: onnx.NodeProto) -> None:
        """Rows of a table, which is kept in float16."""
        table, indices = node.input
        halves = self._half_constant(table)
        rows = self._target.op("Gather", halves, indices, name=f"{node.output[0]}.half")
        self._target.cast(rows, TensorProto.FLOAT, node.output[0])

    def _half_constant(self, name: str) -> str:
        value = numpy_helper.to_array(self._weights[name])
        return self._target.constant(f"{name}.half", value.astype(np.float16))

    def _matrix(self, name: str) -> NDArray[np.float32] | None:
        """A weight [I, O] in float32; None where the name is not that of one."""
        tensor = self._weights.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            return None
        value: NDArray[np.float32] = numpy_helper.to_array(tensor)
        return value


class _Halving(_Rewriting):
    def replaced(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in _PRODUCTS:
            return False
        output = node.output[0]
        half = onnx.NodeProto()
        half.CopyFrom(node)
        half.input[:] = list(self._halves(node))
        half.output[:] = [f"{output}.half"]
        self._target.copy(half)
        self._target.cast(half.output[0], TensorProto.FLOAT, output)
        return True

    def _halves(self, node: onnx.NodeProto) -> Iterator[str]:
        """The inputs of a node in float16."""
        for index, name in enumerate(node.input):
            if name in self._weights:
                yield self._half_constant(name)
            elif name:
                half = f"{node.output[0]}.input{index}"
                yield self._target.cast(name, TensorProto.FLOAT16, half)
            else:
                yield ""  # left out


class _Quantizing(_Rewriting):
    def replaced(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in ("MatMul", "Gemm"):
            return False
        matrix = self._matrix(node.input[1])
        options = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = {"transB": 0, "transA": 0, "alpha": 1.0, "beta": 1.0} | options
        if matrix is None or (plain["transA"], plain["alpha"], plain["beta"]) != (0, 1, 1):
            return False
        if plain["transB"]:
            matrix = matrix.T
        output = node.output[0]
        product = self._target.product(node.input[0], f"{output}.int8", matrix)
        if len(node.input) > 2:
            bias = numpy_helper.to_array(self._weights[node.input[2]])
            bias = self._target.constant(node.input[2], bias)
            self._target.op("Add", product, bias, name=output)
        else:
            self._target.op("Identity", product, name=output)
        return True
