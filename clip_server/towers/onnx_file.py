"""ONNX models in files, however large: protobuf allows no message of 2 GiB or more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

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


@contextmanager
def packed(model: onnx.ModelProto) -> Iterator[Path | bytes]:
    """A model as libraries take it: in memory, or where it is too large for that, in a file that
    is there for as long as the context."""
    if fits(model):
        message = model.SerializeToString()
        del model  # or its weights would be in memory twice
        yield message
        return
    with TemporaryDirectory(prefix="clip-server-") as folder:
        path = Path(folder, "tower.onnx")
        save(model, path)
        yield path


def digest(model: onnx.ModelProto) -> str:
    """A hash of all that a model computes, its weights included."""
    graph = model.graph
    parts = [*model.opset_import, *graph.node, *graph.input, *graph.output, *graph.initializer]
    found = blake2b(digest_size=16)
    for part in parts:
        message = part.SerializeToString(deterministic=True)
        found.update(len(message).to_bytes(8, "little"))
        found.update(message)
    return found.hexdigest()
