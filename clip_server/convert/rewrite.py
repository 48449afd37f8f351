"""Rewrites graphs that torch exported: unchanged, or with matrix products in float16 or int8.

Everything else stays in float32, whatever the architecture: layer norm, softmax, inputs and
outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from clip_server.model_card import Precision
from clip_server.towers.builder import BUILDERS, GraphBuilder

_PRODUCTS = ("MatMul", "Gemm", "Conv")


def rewrite(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """Rewrites a float32 model in a precision, without its exporter's metadata.

    fp32: unchanged.
    fp16: products, of weights or of activations, and weights in float16.
    int8: products by a matrix of weights in integers, as in `quantize`; lookup tables in
        float16; convolutions and products of activations stay in float32.
    """
    rewriters = {"fp32": _Rewriter, "fp16": _Fp16Rewriter, "int8": _Int8Rewriter}
    return rewriters[precision](model, BUILDERS[precision](model.graph.name)).rewrite()


class _Rewriter:
    """Copies a model node by node; subclasses replace some nodes."""

    def __init__(self, model: onnx.ModelProto, target: GraphBuilder) -> None:
        self._model, self._target = model, target
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}

    def rewrite(self) -> onnx.ModelProto:
        """The new model."""
        for node in self._model.graph.node:
            if not self._replace(node):
                self._add(node)
        return self._target.closed(self._model.graph.input, self._model.graph.output)

    def _replace(self, node: onnx.NodeProto) -> bool:
        """Adds the replacement of a node; returns whether there is one."""
        del node
        return False

    def _add(self, node: onnx.NodeProto) -> None:
        for name in node.input:
            if name in self._weights:
                self._target.constant(name, self._value(name))
        self._target.copy(
            onnx.NodeProto(
                name=node.name,
                op_type=node.op_type,
                domain=node.domain,
                input=node.input,
                output=node.output,
                attribute=node.attribute,
            )
        )

    def _value(self, name: str) -> NDArray[np.float32]:
        value: NDArray[np.float32] = numpy_helper.to_array(self._weights[name])
        return value

    def _matrix(self, name: str) -> NDArray[np.float32] | None:
        """The float32 weight [I, O] of a name; None if it is something else."""
        tensor = self._weights.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 2:
            return None
        return self._value(name)


class _Fp16Tables(_Rewriter):
    """Stores lookup tables in float16."""

    def _replace(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "Gather" or self._matrix(node.input[0]) is None:
            return False
        table, indices = node.input
        output = node.output[0]
        rows = self._target.op("Gather", self._half(table), indices, name=f"{output}.half")
        self._target.cast(rows, np.float32, output)
        return True

    def _half(self, name: str) -> str:
        return self._target.constant(f"{name}.half", self._value(name).astype(np.float16))


class _Fp16Rewriter(_Fp16Tables):
    """Multiplies in float16."""

    def _replace(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in _PRODUCTS:
            return super()._replace(node)
        output = node.output[0]
        half = onnx.NodeProto(
            name=node.name,
            op_type=node.op_type,
            input=self._inputs(node),
            output=[f"{output}.half"],
        )
        half.attribute.extend(node.attribute)
        self._target.copy(half)
        self._target.cast(half.output[0], np.float32, output)
        return True

    def _inputs(self, node: onnx.NodeProto) -> Iterator[str]:
        for index, name in enumerate(node.input):
            if name in self._weights:
                yield self._half(name)
            elif name:
                half = f"{node.output[0]}.input{index}"
                yield self._target.cast(name, np.float16, half)
            else:
                yield ""  # an optional input that is absent


class _Int8Rewriter(_Fp16Tables):
    """Multiplies by matrices of weights in integers."""

    def _replace(self, node: onnx.NodeProto) -> bool:
        if node.op_type not in ("MatMul", "Gemm"):
            return super()._replace(node)
        matrix = self._matrix(node.input[1])
        if matrix is None:
            return False
        (output,) = node.output
        if any(each.name == "transB" and each.i for each in node.attribute):
            matrix = matrix.T
        product = self._target.product(node.input[0], f"{output}.int8", matrix)
        if len(node.input) > 2:
            bias = self._target.constant(node.input[2], self._value(node.input[2]))
            self._target.op("Add", product, bias, name=output)
        else:
            self._target.op("Identity", product, name=output)
        return True
