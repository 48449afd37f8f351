"""ONNX models assembled node by node, in float32, float16 or int8.

The three builders have the same methods, so that a tower is described once. Values that pass
between methods have the type the graph computes in: float32, or float16 in `Fp16Builder`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from clip_server.model_card import Precision
from clip_server.towers import quantize
from clip_server.towers.tower import EPSILON, Activation

Weights = Mapping[str, NDArray[Any]]
# Puts the value of a constant into its message, or elsewhere, with a reference in the message.
Store = Callable[[TensorProto, NDArray[Any]], None]

OPSET = 18
IR_VERSION = 8  # the one that came with the opset
# The domain of onnxruntime's own operators.
_ONNXRUNTIME = "com.microsoft"
# The slope in QuickGELU, x * sigmoid(1.702 x).
_QUICK_GELU = 1.702
# The factor of the cube in the approximation of GELU by a hyperbolic tangent.
_GELU_CUBIC = 0.044715


def store_inline(tensor: TensorProto, value: NDArray[Any]) -> None:
    """Stores a constant in the model itself."""
    tensor.raw_data = value.tobytes()


class GraphBuilder:
    """A model to which nodes and weights are added. Each op returns the name of its output.

    tensors: a checkpoint, by the names that `weight` and the arguments called `tensor` refer to.
    store: where constants are kept, such as `onnx_file.DataFile`; by default in the model.
    """

    _float: ClassVar[np.dtype[Any]] = np.dtype(np.float32)

    def __init__(
        self, name: str, tensors: Weights | None = None, store: Store = store_inline
    ) -> None:
        self._tensors = tensors if tensors is not None else {}
        self._store = store
        self._constants: set[str] = set()
        # Weights are written into this message directly: every copy takes time and memory.
        self._model = onnx.ModelProto(
            ir_version=IR_VERSION,
            producer_name="clip-server",
            opset_import=[helper.make_opsetid("", OPSET)],
        )
        self._graph = self._model.graph
        self._graph.name = name

    def op(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """Adds a node whose name and only output are `name`."""
        self._graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def copy(self, node: onnx.NodeProto) -> None:
        """Adds a node of another model of this opset."""
        self._graph.node.append(node)

    def split(self, source: str, parts: Sequence[str], axis: int) -> list[str]:
        """Equal parts of `source` along an axis."""
        outputs = [f"{source}.{part}" for part in parts]
        name, count = f"{source}.split", len(parts)
        node = helper.make_node("Split", [source], outputs, name=name, axis=axis, num_outputs=count)
        self._graph.node.append(node)
        return outputs

    def has_weight(self, name: str) -> bool:
        """Whether the checkpoint has a tensor."""
        return name in self._tensors

    def weight(self, name: str) -> NDArray[np.float32]:
        """A tensor of the checkpoint, as float32."""
        return self._tensors[name].astype(np.float32, copy=False)

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """A constant of its own dtype."""
        if name not in self._constants:
            self._constants.add(name)
            tensor = self._graph.initializer.add(
                name=name, dims=value.shape, data_type=_onnx_type(value.dtype)
            )
            self._store(tensor, value)
        return name

    def floats(self, name: str, value: NDArray[np.float32]) -> str:
        """A constant of the dtype that the graph computes in."""
        return self.constant(name, value.astype(self._float, copy=False))

    def integers(self, *values: int) -> str:
        """An int64 constant [n], such as a shape; equal ones are stored once."""
        return self.constant(f"i64{list(values)}", np.array(values, dtype=np.int64))

    def number(self, value: float) -> str:
        """A scalar float constant; equal ones are stored once."""
        return self.floats(f"float({value:.6g})", np.array(value, dtype=np.float32))

    def cast(self, source: str, to: npt.DTypeLike, name: str) -> str:
        """Casts source to the numpy dtype `to`."""
        return self.op("Cast", source, name=name, to=_onnx_type(to))

    def as_computed(self, source: str) -> str:
        """Casts a float32 source to the dtype that the graph computes in."""
        return source

    def linear(
        self, source: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> str:
        """source [N, I] by weight [O, I], as torch stores it, plus bias [O]."""
        inputs = self.floats(f"{name}.weight", weight), self.floats(f"{name}.bias", bias)
        return self.op("Gemm", source, *inputs, name=name, transB=1)

    def stored_linear(
        self, source: str, tensor: str, scale: NDArray[np.float32] | None = None
    ) -> str:
        """A torch Linear of the checkpoint, or a Conv2d of single positions.

        scale: by which each output is multiplied, [O]; None: by nothing.
        """
        weight, bias = self._scaled(tensor, scale)
        return self.linear(source, tensor, weight.reshape(len(bias), -1), bias)

    def _scaled(
        self, tensor: str, scale: NDArray[np.float32] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The weight and the bias of a layer of the checkpoint, with its outputs scaled."""
        weight, bias = self.weight(f"{tensor}.weight"), self.weight(f"{tensor}.bias")
        if scale is None:
            return weight, bias
        return weight * scale.reshape(-1, *(1 for _ in weight.shape[1:])), bias * scale

    def joined_linear(self, source: str, name: str, tensors: Sequence[str]) -> str:
        """Several torch Linears of the checkpoint as one; their outputs are side by side."""
        weights = np.concatenate([self.weight(f"{tensor}.weight") for tensor in tensors])
        biases = np.concatenate([self.weight(f"{tensor}.bias") for tensor in tensors])
        return self.linear(source, name, weights, biases)

    def product(self, source: str, name: str, matrix: NDArray[np.float32]) -> str:
        """source [..., I] by a matrix [I, O]."""
        return self.op("MatMul", source, self.floats(name, matrix), name=f"{name}.out")

    def convolution(
        self,
        source: str,
        name: str,
        kernel: NDArray[np.float32],
        bias: NDArray[np.float32],
        *,
        stride: int = 1,
        groups: int = 1,
    ) -> str:
        """source [B, I, S, S] by a kernel [O, I / groups, K, K], plus bias [O].

        Every side is padded with K // 2 zeros, so that a stride of 1 keeps the size.
        """
        return self.op(
            "Conv",
            source,
            self.floats(f"{name}.weight", kernel),
            self.floats(f"{name}.bias", bias),
            name=name,
            strides=[stride] * 2,
            pads=[kernel.shape[-1] // 2] * 4,
            group=groups,
        )

    def stored_convolution(
        self, source: str, tensor: str, *, stride: int = 1, groups: int = 1
    ) -> str:
        """A torch Conv2d of the checkpoint, padded as in `convolution`."""
        kernel, bias = self.weight(f"{tensor}.weight"), self.weight(f"{tensor}.bias")
        return self.convolution(source, tensor, kernel, bias, stride=stride, groups=groups)

    def pointwise_mlp(
        self, source: str, tensors: tuple[str, str], scale: NDArray[np.float32]
    ) -> str:
        """Two torch Conv2d of single positions, with a GELU between them: source [B, C, S, S] to
        the same.

        scale: by which each output of the second is multiplied, [C].
        """
        first, second = tensors
        hidden = self.gelu(self.stored_convolution(source, first), f"{first}.gelu")
        return self.convolution(hidden, second, *self._scaled(second, scale))

    def linear_from_uint8(
        self, source: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> str:
        """As `linear`, of a uint8 source."""
        return self.linear(self.cast_from_uint8(source), name, weight, bias)

    def cast_from_uint8(self, source: str) -> str:
        """Casts a uint8 source to the dtype that the graph computes in."""
        return self.cast(source, self._float, f"{source}.float")

    def lookup(self, name: str, table: NDArray[np.float32], indices: str) -> str:
        """The rows of a table [V, W] at `indices`."""
        return self.op("Gather", self.floats(name, table), indices, name=f"{name}.rows")

    def projection(self, source: str, tensor: str) -> str:
        """source [N, I] by a matrix [I, O] of the checkpoint."""
        return self.product(source, tensor, self.weight(tensor))

    def layer_norm(self, source: str, tensor: str, epsilon: float = EPSILON) -> str:
        """A torch LayerNorm of the checkpoint, over the last axis."""
        scale = self.constant(f"{tensor}.weight", self.weight(f"{tensor}.weight"))
        bias = self.constant(f"{tensor}.bias", self.weight(f"{tensor}.bias"))
        return self.op(
            "LayerNormalization", source, scale, bias, name=tensor, axis=-1, epsilon=epsilon
        )

    def softmax(self, source: str, name: str) -> str:
        """Over the last axis."""
        return self.op("Softmax", source, name=name, axis=-1)

    def activation(self, kind: Activation, source: str, name: str) -> str:
        """One of the activations of an MLP."""
        activations = {
            "gelu": self.gelu,
            "quick_gelu": self.quick_gelu,
            "gelu_tanh": self.gelu_tanh,
        }
        return activations[kind](source, name)

    def gelu(self, source: str, name: str) -> str:
        """The exact GELU."""
        root = self.op("Div", source, self.number(math.sqrt(2)), name=f"{name}.scaled")
        gate = self.op("Erf", root, name=f"{name}.erf")
        gate = self.op("Add", gate, self.number(1), name=f"{name}.gate")
        doubled = self.op("Mul", source, gate, name=f"{name}.doubled")
        return self.op("Mul", doubled, self.number(0.5), name=name)

    def quick_gelu(self, source: str, name: str) -> str:
        """OpenAI's approximation of GELU."""
        steeper = self.op("Mul", source, self.number(_QUICK_GELU), name=f"{name}.scaled")
        gate = self.op("Sigmoid", steeper, name=f"{name}.gate")
        return self.op("Mul", source, gate, name=name)

    def gelu_tanh(self, source: str, name: str) -> str:
        """The approximation of GELU by a hyperbolic tangent."""
        cubic = self.op("Mul", source, self.number(_GELU_CUBIC), name=f"{name}.cubic")
        cubic = self.op("Mul", source, cubic, name=f"{name}.square")
        slope = self.op("Add", cubic, self.number(1), name=f"{name}.slope")
        scaled = self.op("Mul", source, self.number(math.sqrt(2 / math.pi)), name=f"{name}.scaled")
        scaled = self.op("Mul", scaled, slope, name=f"{name}.bent")
        gate = self.op("Tanh", scaled, name=f"{name}.tanh")
        gate = self.op("Add", gate, self.number(1), name=f"{name}.gate")
        half = self.op("Mul", source, self.number(0.5), name=f"{name}.half")
        return self.op("Mul", half, gate, name=name)

    def finished(self, source: onnx.ValueInfoProto, embedding: str, dim: int) -> onnx.ModelProto:
        """The model, from `source` to `embedding` [B, dim] float32."""
        self.cast(embedding, np.float32, "embedding")
        target = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", dim])
        return self.closed([source], [target])

    def closed(
        self, sources: Sequence[onnx.ValueInfoProto], targets: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The model, between inputs and outputs whose nodes exist."""
        self._graph.input.extend(sources)
        self._graph.output.extend(targets)
        return self._model


class Fp16Builder(GraphBuilder):
    """Computes in float16, except layer norm and softmax, which sum, in float32.

    Casts make every type explicit, so that TensorRT can build the graph as strongly typed.
    """

    _float = np.dtype(np.float16)

    def as_computed(self, source: str) -> str:
        return self.cast(source, np.float16, f"{source}.half")

    def layer_norm(self, source: str, tensor: str, epsilon: float = EPSILON) -> str:
        return self._in_float32(partial(super().layer_norm, epsilon=epsilon), source, tensor)

    def softmax(self, source: str, name: str) -> str:
        return self._in_float32(super().softmax, source, name)

    def _in_float32(self, op: Callable[[str, str], str], source: str, name: str) -> str:
        wide = self.cast(source, np.float32, f"{name}.wide")
        return self.as_computed(op(wide, name))


class Int8Builder(GraphBuilder):
    """Multiplies by its matrices in integers, and keeps its tables in float16."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._model.opset_import.append(helper.make_opsetid(_ONNXRUNTIME, 1))

    def linear(
        self, source: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> str:
        product = self.product(source, name, weight.T)
        return self.op("Add", product, self.constant(f"{name}.bias", bias), name=f"{name}.biased")

    def product(self, source: str, name: str, matrix: NDArray[np.float32]) -> str:
        rows, scale = self._quantized_rows(source, name)
        product = self._integer_product(rows, name, matrix)
        return self.op("Mul", product, scale, name=f"{name}.out")

    def linear_from_uint8(
        self, source: str, name: str, weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> str:
        # Subtracting a medium grey from the pixels, and adding it to the bias, keeps the rounding
        # errors of the weights from adding up to an offset that grows with the brightness.
        bias = bias + np.float32(quantize.ROW_ZERO) * weight.sum(axis=1)
        return self._integer_product(source, name, weight.T, bias)

    def pointwise_mlp(
        self, source: str, tensors: tuple[str, str], scale: NDArray[np.float32]
    ) -> str:
        (first, second), width = tensors, self.integers(-1, len(scale))
        last = self.op("Transpose", source, name=f"{first}.last", perm=[0, 2, 3, 1])
        rows = self.op("Reshape", last, width, name=f"{first}.flat")
        hidden = self.gelu(self.stored_linear(rows, first), f"{first}.gelu")
        rows = self.stored_linear(hidden, second, scale)
        shape = self.op("Shape", last, name=f"{first}.shape")
        squares = self.op("Reshape", rows, shape, name=f"{second}.squares")
        return self.op("Transpose", squares, name=f"{second}.channels", perm=[0, 3, 1, 2])

    def lookup(self, name: str, table: NDArray[np.float32], indices: str) -> str:
        halves = self.constant(name, table.astype(np.float16))
        rows = self.op("Gather", halves, indices, name=f"{name}.half")
        return self.cast(rows, np.float32, f"{name}.rows")

    def _quantized_rows(self, source: str, name: str) -> tuple[str, str]:
        """source [..., I] as uint8 about `ROW_ZERO`, and the scale of each row [..., 1]."""
        last = self.integers(-1)
        highest = self.op("ReduceMax", source, last, name=f"{name}.highest")
        lowest = self.op("ReduceMin", source, last, name=f"{name}.lowest")
        lowest = self.op("Neg", lowest, name=f"{name}.depth")
        least = self.number(quantize.SMALLEST)
        largest = self.op("Max", highest, lowest, least, name=f"{name}.largest")
        step = self.number(1 / quantize.LARGEST)
        scale = self.op("Mul", largest, step, name=f"{name}.scale")
        inverse = self.op("Reciprocal", scale, name=f"{name}.inverse")
        values = self.op("Mul", source, inverse, name=f"{name}.scaled")
        one, zero = self.number(1), self._row_zero()
        rows = self.op("QuantizeLinear", values, one, zero, name=f"{name}.rows")
        return rows, scale

    def _integer_product(
        self,
        rows: str,
        name: str,
        matrix: NDArray[np.float32],
        bias: NDArray[np.float32] | None = None,
    ) -> str:
        """uint8 rows [..., I] about `ROW_ZERO` by a matrix [I, O], plus a bias [O], in float32."""
        integers, scale = quantize.quantized(matrix)
        biases = [] if bias is None else [self.constant(f"{name}.bias", bias)]
        # An empty name is an omitted input: the zero points of the matrix.
        left_out = [""] if biases else []
        return self.op(
            "MatMulIntegerToFloat",
            rows,
            self.constant(f"{name}.integers", integers),
            self.number(1),
            self.constant(f"{name}.scales", scale),
            self._row_zero(),
            *left_out,
            *biases,
            name=f"{name}.product",
            domain=_ONNXRUNTIME,
        )

    def _row_zero(self) -> str:
        return self.constant("row_zero", np.array(quantize.ROW_ZERO, dtype=np.uint8))


def _onnx_type(dtype: npt.DTypeLike) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


BUILDERS: dict[Precision, type[GraphBuilder]] = {
    "fp32": GraphBuilder,
    "fp16": Fp16Builder,
    "int8": Int8Builder,
}
