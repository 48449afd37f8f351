"""Reads and writes ONNX models of any size; protobuf limits a message to 2 GiB.

While a graph is built its weights can be kept outside of it, in a file or as arrays, so that they
are never in memory twice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from clip_server.towers.builder import store_inline

# Bytes of weights in one message. The nodes of a tower fit into the rest.
LARGEST = 2_000_000_000

# Smaller weights stay in the message, where shapes and scalars must be.
_SMALLEST_EXTERNAL = 1024
# That of pages; vector instructions need less.
_ALIGNMENT = 4096
# Of the keys of references to packed weights: "key|offset;length;checksum|...".
_PACKED = "prepacked_"


class DataFile:
    """Stores the weights of a graph in a file next to it.

    file: open for writing, in the folder that the model will be in.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def __call__(self, tensor: TensorProto, value: NDArray[Any]) -> None:
        if value.nbytes < _SMALLEST_EXTERNAL:
            store_inline(tensor, value)
            return
        offset = self.append(np.ascontiguousarray(value).data)
        _refer(tensor, Path(self._file.name).name, offset=offset, length=value.nbytes)

    def append(self, content: memoryview) -> int:
        """Adds bytes, aligned; returns their offset."""
        self._file.write(bytes(-self._file.tell() % _ALIGNMENT))
        offset = self._file.tell()
        self._file.write(content)
        return offset


class ArrayStore:
    """Keeps the weights of a graph as arrays, which may be mapped from a checkpoint.

    arrays: by the names that the graph refers to them by.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}

    def __call__(self, tensor: TensorProto, value: NDArray[Any]) -> None:
        if value.nbytes < _SMALLEST_EXTERNAL:
            store_inline(tensor, value)
            return
        self.arrays[tensor.name] = np.ascontiguousarray(value)
        _refer(tensor, "memory")


def _refer(tensor: TensorProto, location: str, **entries: int) -> None:
    """Makes a weight refer to bytes outside of the model."""
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


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


def external_files(path: Path) -> set[str]:
    """The files that hold weights of a model, as paths seen from its own folder."""
    model = onnx.load(path, load_external_data=False)
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return {entry.value for entry in entries if entry.key == "location"}


def align(path: Path) -> None:
    """Aligns the weights of a model that onnxruntime saved with packed ones, in `PATH.data`.

    onnxruntime aligns large ones only, and ends with a segmentation fault on some of the others,
    which are copied to the end of the file.
    """
    model = onnx.load(path, load_external_data=False)
    with path.with_name(f"{path.name}.data").open("r+b") as content:
        data = DataFile(content)

        def aligned(offset: str, length: str) -> str:
            if int(offset) % _ALIGNMENT == 0:
                return offset
            content.seek(int(offset))
            copied = memoryview(content.read(int(length)))
            content.seek(0, os.SEEK_END)
            return str(data.append(copied))

        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            entries = {entry.key: entry for entry in tensor.external_data}
            offset = entries["offset"]
            offset.value = aligned(offset.value, entries["length"].value)
            for entry in (each for key, each in entries.items() if key.startswith(_PACKED)):
                key, *blobs = entry.value.split("|")
                parts = [blob.split(";") for blob in blobs]
                moved = [";".join([aligned(*part[:2]), *part[1:]]) for part in parts]
                entry.value = "|".join([key, *moved])
    path.write_bytes(model.SerializeToString())


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
