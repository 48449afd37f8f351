"""ONNX models in files, however large: protobuf allows no message of 2 GiB or more."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import helper

# Of the weights, in bytes. The nodes of a tower need less than what this leaves.
LARGEST = 2_000_000_000


def fits(model: onnx.ModelProto) -> bool:
    """Whether a model can be one message, as a file of its own or as bytes."""
    # Asking the message itself would serialize it.
    return weight_bytes(model) <= LARGEST


def weight_bytes(model: onnx.ModelProto) -> int:
    """The bytes of a model's weights."""
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model; the weights of one that does not fit go into `PATH.data` beside it.

    The weights are then taken out of `model`, which would need as much memory again.
    """
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    large = not fits(model)
    onnx.save_model(model, path, save_as_external_data=large, location=data.name)
