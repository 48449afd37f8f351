"""Reads and writes ONNX models of any size; protobuf limits a message to 2 GiB."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper

# Bytes of weights in one message. The nodes of a tower fit into the rest.
LARGEST = 2_000_000_000


def fits(model: onnx.ModelProto) -> bool:
    """Whether a model fits into one message, in a single file or in memory."""
    # Asking the message itself would serialize it.
    return weight_bytes(model) <= LARGEST


def weight_bytes(model: onnx.ModelProto) -> int:
    """The bytes of a model's weights."""
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model; if it does not fit into one message, its weights go into `PATH.data`.

    The weights are then removed from `model`: a copy would need as much memory again.
    """
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to it
    large = not fits(model)
    onnx.save_model(model, path, save_as_external_data=large, location=data.name)


@contextmanager
def packed(model: onnx.ModelProto) -> Iterator[Path | bytes]:
    """Serializes a model for libraries: to bytes, or if it is too large, to a temporary file that
    exists as long as the context."""
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
    """A hash of everything a model computes, its weights included."""
    graph = model.graph
    parts = [*model.opset_import, *graph.node, *graph.input, *graph.output, *graph.initializer]
    found = blake2b(digest_size=16)
    for part in parts:
        message = part.SerializeToString(deterministic=True)
        found.update(len(message).to_bytes(8, "little"))
        found.update(message)
    return found.hexdigest()
