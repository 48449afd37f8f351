"""Reads the zip archives that `torch.save` writes, without torch and without running code in them.

An archive has a pickle, `data.pkl`, in which tensors refer to storages, and a file with the raw
values of each storage. Only what state dictionaries consist of is unpickled.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

# The types of a storage's values, by the names of torch's classes.
_DTYPES: dict[str, np.dtype[Any]] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Other things that checkpoints hold, such as the state of an optimizer; none of them runs code.
# Types of values are replaced by their names.
_CLASSES: dict[tuple[str, str], Any] = {
    ("__builtin__", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("torch", "Size"): tuple,
    **{("torch", name): name for name in ("float64", "float32", "float16", "bfloat16", "int64")},
}
_SIGNATURE = b"PK\x03\x04"
# The fixed part of the header that precedes a file in an archive, and where it has the lengths of
# the two parts that follow: a name, and extra fields.
_HEADER_BYTES, _LENGTHS = 30, slice(26, 30)


class CodeError(Exception):
    """The pickle refers to something that may run code; the message is its name."""


@dataclass(frozen=True)
class Storage:
    """The values of one or more tensors. begin: of the first in the archive, in bytes."""

    path: Path
    begin: int
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in an archive. offset, strides: in values of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def read(self) -> NDArray[Any]:
        """Its values, mapped from the archive. A page that is written to becomes a private copy."""
        dtype = self.storage.dtype
        if 0 in self.shape:
            return np.zeros(self.shape, dtype)
        begin = self.storage.begin + self.offset * dtype.itemsize
        mapped = np.memmap(self.storage.path, dtype, "c", begin, (self._extent(),))
        strides = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(mapped.view(np.ndarray), self.shape, strides)

    def check(self) -> None:
        """Raises ValueError if it is not within its storage."""
        numbers = (self.offset, *self.shape, *self.strides)
        fits = len(self.shape) == len(self.strides) and min(numbers) >= 0
        if not fits or (0 not in self.shape and self.offset + self._extent() > self.storage.count):
            raise ValueError(f"a tensor of shape {self.shape} exceeds its storage")

    def _extent(self) -> int:
        """Values from its first to its last."""
        sides = zip(self.shape, self.strides, strict=True)
        return 1 + sum((side - 1) * stride for side, stride in sides)


def is_archive(path: Path) -> bool:
    """Whether a file begins as an archive does."""
    with path.open("rb") as file:
        return file.read(len(_SIGNATURE)) == _SIGNATURE


def load(path: Path) -> Any:
    """Unpickles an archive; its tensors are `StoredTensor`.

    Raises:
        CodeError: it contains something that may run code.
        Exception: of any kind, if it is damaged.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        return _Unpickler(archive, file, pickled).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, file: IO[bytes], pickled: str) -> None:
        _uncompressed(archive, pickled)
        super().__init__(io.BytesIO(archive.read(pickled)))
        self._archive, self._file = archive, file
        self._folder = pickled.removesuffix("data.pkl")

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return name
        # Methods, since a pickle may set attributes of functions.
        functions = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): self._parameter,
            ("torch", "device"): self._device,
            ("_codecs", "encode"): self._bytes,
        }
        found = _CLASSES.get((module, name)) or functions.get((module, name))
        if found is None:
            raise CodeError(f"{module}.{name}")
        return found

    def persistent_load(self, reference: Any) -> Storage:
        _, kind, key, _, count = reference
        dtype, info = _DTYPES[kind], _uncompressed(self._archive, f"{self._folder}data/{key}")
        if not 0 <= count * dtype.itemsize <= info.file_size:
            raise ValueError(f"storage {key} has fewer than {count} values")
        self._file.seek(info.header_offset)
        lengths = self._file.read(_HEADER_BYTES)[_LENGTHS]
        begin = info.header_offset + _HEADER_BYTES + int(np.frombuffer(lengths, "<u2").sum())
        return Storage(Path(self._file.name), begin, dtype, count)

    def _tensor(
        self, storage: Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
    ) -> StoredTensor:
        found = StoredTensor(storage, offset, tuple(shape), tuple(strides))
        found.check()
        return found

    def _parameter(self, tensor: StoredTensor, *_: Any) -> StoredTensor:
        return tensor

    def _device(self, *parts: Any) -> str:
        return ":".join(map(str, parts))

    def _bytes(self, text: str, _: str) -> bytes:
        return text.encode("latin1")  # as pickles of protocol 2 store bytes


def _uncompressed(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    return info
