"""Finds the weights of a model on disk, in the hub's cache or on the hub, reads and checks them."""

from __future__ import annotations

import json
import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # with it, safetensors can give numpy arrays of bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clip_server.errors import ConfigurationError, WeightsError
from clip_server.install import install_hint
from clip_server.model_card import ModelCard
from clip_server.models import hub, torch_archive
from clip_server.models.state_dict_keys import (
    Loader,
    is_used,
    to_open_clip_keys,
    without_text_prefix,
)

Tensors = Mapping[str, NDArray[Any]]

CHECKPOINT = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
# Checkpoints that torch pickled: archives, which `torch_archive` reads, and those of before torch
# 1.6, which only torch reads.
_PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
# The same weights as open_clip's older repositories hold them.
_PICKLED_CHECKPOINT = "open_clip_pytorch_model.bin"
# The names that transformers gives them.
HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
# Endings of tensor names that a checkpoint may hold or lack, since no tower needs them.
_HARMLESS = (
    *("attn_mask", "position_ids", "num_batches_tracked", "logit_bias"),
    # Numbers in OpenAI's archives.
    *("input_resolution", "context_length", "vocab_size"),
)
# Prefixes that wrappers of a model give to all its tensors: training on several GPUs,
# torch.compile, a Lightning module.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
# The keys under which trainers save the weights.
_STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model")
# The class or function that torch refuses to unpickle, in its error message.
_PICKLED_CLASS = re.compile(r"(?:GLOBAL|global) ([\w.]+)")
# Tensors that an error message lists.
_SHOWN = 3
# Types in safetensors that are mapped; tensors of others, and of those numpy lacks, are copied.
_MAPPED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_LENGTH_BYTES = 8  # of the number at the beginning of a safetensors file


class CheckpointTensors(Tensors):
    """The tensors of a checkpoint, by name; each is read, or mapped, when it is looked up.

    files: that hold them.
    """

    def __init__(self, loaders: Mapping[str, Loader], *files: Path) -> None:
        self._loaders = dict(loaders)
        self.files = files

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def replaced(self, others: CheckpointTensors, prefixes: tuple[str, ...]) -> CheckpointTensors:
        """These tensors, with those of another checkpoint whose names begin with a prefix."""
        taken = {name: load for name, load in others._loaders.items() if name.startswith(prefixes)}
        return CheckpointTensors(self._loaders | taken, *self.files, *others.files)


def find(card: ModelCard, model_path: str | Path | None = None) -> Path:
    """The checkpoint of a card, downloaded if necessary.

    model_path: as in `local`; without it the file comes from the card's hub repository, or from
        the hub's cache.

    Raises:
        WeightsError: there is no such file, or the hub cannot be reached.
    """
    if model_path is not None:
        return local(Path(model_path))
    if card.hub is None:
        raise WeightsError(f"{card.name} has no weights to download: give a model_path")
    return cached(card) or hub.download(card.hub, _hub_files(card))


def cached(card: ModelCard) -> Path | None:
    """The checkpoint of a card in the hub's cache; None if it is not there."""
    files = _hub_files(card) if card.hub else ()
    found = (hub.find_cached(card.hub, file) for file in files if card.hub)
    return next((path for path in found if path), None)


def local(path: Path) -> Path:
    """The checkpoint at a `model_path`.

    path: a file of one of `SUFFIXES`; or a folder with `open_clip_model.safetensors`, or with
        one file of those.

    Raises:
        WeightsError: it is none of these.
    """
    try:
        file = in_folder(path)
    except OSError as error:
        raise WeightsError(f"no checkpoint at {path}: {error.strerror}") from error
    if file is None:
        seen_from = "" if path.is_absolute() else f", seen from {Path.cwd()}"
        raise WeightsError(
            f"no checkpoint at {path}: that {describe(path)}{seen_from}; model_path is a file "
            f"({', '.join(SUFFIXES)}), or a folder with {CHECKPOINT} or with a single one of "
            "those; for ONNX also one with visual.onnx and textual.onnx"
        )
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"{file} is not a checkpoint: they end in {', '.join(SUFFIXES)}")
    return file


def describe(path: Path) -> str:
    """Says why a path is not a checkpoint, as the rest of a sentence."""
    if path.is_dir():
        return "is a folder without one, or with several"
    if path.is_symlink() and not path.exists():
        return "is a link to something that does not exist"
    return "is not a regular file" if path.exists() else "does not exist"


def in_folder(path: Path) -> Path | None:
    """The checkpoint in a folder, or the file itself; None if there is none, or more than one."""
    if not path.is_dir():
        return path if path.is_file() else None
    for name in (CHECKPOINT, _PICKLED_CHECKPOINT, *HUGGING_FACE):
        if (path / name).is_file():
            return path / name
    found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    return found[0] if len(found) == 1 else None


def read(path: Path) -> CheckpointTensors:
    """Opens a checkpoint. Its tensors are unchanged except for bfloat16, which numpy lacks and
    becomes float32. Names are open_clip's, of a Hugging Face model too (see `state_dict_keys`).

    Raises:
        WeightsError: the file is damaged, not a checkpoint, or contains code.
        ConfigurationError: it is a pickle of before torch 1.6, and torch is not installed.
    """
    file = _open(path)
    loaders = to_open_clip_keys({name: partial(file.tensor, name) for name in file.names})
    return CheckpointTensors(loaders, path)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shape of every tensor of a checkpoint, by the names in the file. Raises what
    `read` does."""
    file = _open(path)
    return {name: file.shape(name) for name in file.names}


def read_logit_scale(path: Path) -> float:
    """Reads the factor on cosines, exp(logit_scale), without the other tensors.

    Raises:
        WeightsError: as `read`, or the checkpoint holds no logit scale.
    """
    scale = _read_number(path, "logit_scale")
    if scale is None:
        raise WeightsError(f"{path} is not a CLIP checkpoint: it has no logit_scale")
    return float(np.exp(scale))


def read_logit_bias(path: Path) -> float:
    """Reads what is added to scaled cosines before a sigmoid; 0 if the checkpoint lacks it, as in
    open_clip. Raises what `read` does."""
    return _read_number(path, "logit_bias") or 0.0


def _read_number(path: Path, name: str) -> float | None:
    file = _open(path)
    return float(file.tensor(name).astype(np.float64).item()) if name in file.names else None


def check(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a checkpoint has the tensors of an architecture.

    tensors: numpy's or torch's.

    Raises:
        WeightsError: tensors are missing, of another shape, or left over; names the first few.
    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if faults := differences(found, shapes):
        listed = [f"{_first(names)} ({fault})" for fault, names in faults.items()]
        raise WeightsError("the checkpoint is of another architecture: " + "; ".join(listed))


def differences(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """The tensors that are missing, mismatched or superfluous in a checkpoint, by fault.

    found, expected: the shapes of tensors. A single number may have any number of axes.
    """
    missing = [
        f"{name} {shape}"
        for name, shape in expected.items()
        if name not in found and not name.endswith(_HARMLESS)
    ]
    mismatched = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and not _fits(found[name], shape)
    ]
    left_over = [
        f"{name} {shape}"
        for name, shape in found.items()
        if name not in expected and not name.endswith(_HARMLESS) and is_used(name)
    ]
    faults = {"missing": missing, "of another shape": mismatched, "not in the model": left_over}
    return {fault: names for fault, names in faults.items() if names}


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return shape == expected or math.prod(shape) == math.prod(expected) == 1


class _Checkpoint(ABC):
    """An open checkpoint, of either format.

    names: of its tensors without the prefixes of wrappers and of a separate text tower, each with
        its name in the file.
    """

    def __init__(self, path: Path, stored: Iterable[str]) -> None:
        self.path = path
        self.names = {name: name for name in stored}
        while prefix := self._wrapper():
            self.names = {name.removeprefix(prefix): old for name, old in self.names.items()}
        self.names = {without_text_prefix(name): old for name, old in self.names.items()}

    def _wrapper(self) -> str | None:
        wraps = (each for each in _WRAPPERS if all(name.startswith(each) for name in self.names))
        return next(wraps, None) if self.names else None

    @abstractmethod
    def tensor(self, name: str) -> NDArray[Any]:
        """As stored, but bfloat16 as float32."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...


class _Safetensors(_Checkpoint):
    def __init__(self, path: Path) -> None:
        opened: Any = safe_open
        self._file = opened(path, framework="np")  # checks the file
        super().__init__(path, self._file.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            self._header: dict[str, Any] = json.loads(file.read(length))
        self._begin = _LENGTH_BYTES + length

    def tensor(self, name: str) -> NDArray[Any]:
        stored = self.names[name]
        found = self._header[stored]
        begin, end = found["data_offsets"]
        tensor: NDArray[Any]
        if found["dtype"] not in _MAPPED or begin == end:
            tensor = self._file.get_tensor(stored)
            return tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor
        # Each by itself, so that its pages leave this process with the array. Replicas share them;
        # a page that is written to becomes a private copy.
        dtype, shape = _MAPPED[found["dtype"]], tuple(found["shape"])
        mapped = np.memmap(self.path, dtype, "c", self._begin + begin, shape)
        return mapped.view(np.ndarray)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._header[self.names[name]]["shape"])


class _Pickle(_Checkpoint):
    def __init__(self, path: Path) -> None:
        self._tensors = _unpickled(path)
        super().__init__(path, self._tensors)

    def tensor(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[self.names[name]]
        if isinstance(tensor, torch_archive.StoredTensor):
            array = tensor.read()
            return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array
        wide = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
        values: NDArray[Any] = wide.detach().numpy()
        return values

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self.names[name]].shape)


def _open(path: Path) -> _Checkpoint:
    try:
        path.open("rb").close()  # safetensors calls every such error a missing file
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix in _PICKLES:
        return _Pickle(path)
    try:
        return _Safetensors(path)
    except MemoryError as error:  # under `ulimit -v`
        size = path.stat().st_size >> 20
        raise WeightsError(
            f"{path} cannot be mapped: its {size:,} MiB do not fit into the address space that is "
            "left to this process; raise the limit (ulimit -v)"
        ) from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged, or not a CLIP checkpoint ({error}): fetch or copy it again"
        ) from error


def _unpickled(path: Path) -> dict[str, Any]:
    """Reads the tensors of a pickled checkpoint, torch's or those of `torch_archive`, without
    running any code in it.

    Trainers save them under a key, together with the epoch and the optimizer.
    """
    if zipfile.is_zipfile(path) and _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, which contains code, and that is not run: save the "
            f"tensors alone, torch.save(torch.jit.load({path.name!r}, "
            "map_location='cpu').state_dict(), 'weights.pt')"
        )
    load = torch_archive.load
    if not torch_archive.is_archive(path):
        load = partial(_torch(path).load, map_location="cpu", weights_only=True)
    try:
        found = load(path)
    except Exception as error:  # a damaged file may raise anything
        raise WeightsError(_explain(path, error)) from error
    under_keys = [found.get(key) for key in _STATE_DICT_KEYS] if isinstance(found, dict) else []
    for held in (*under_keys, found):
        items = held.items() if isinstance(held, dict) else ()
        tensors = {name: value for name, value in items if hasattr(value, "shape")}
        if tensors:
            return tensors
    raise WeightsError(f"{path} is not a checkpoint: it holds no tensors by name")


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _explain(path: Path, error: Exception) -> str:
    """Why a pickled checkpoint cannot be read, and what to do about it."""
    found = _PICKLED_CLASS.search(str(error))
    if found or isinstance(error, torch_archive.CodeError):
        return (
            f"{path} contains code ({found[1] if found else error}), which is not run: save the "
            "model's state_dict() alone, as .safetensors if you can"
        )
    return f"{path} is damaged, or not a checkpoint ({type(error).__name__}): copy it again"


def _torch(path: Path | str) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ConfigurationError(
            f"{path} can only be read by torch: save the tensors as .safetensors, or "
            f"{install_hint('torch')}"
        ) from error
    return torch


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hub_files(card: ModelCard) -> tuple[str, ...]:
    """The possible names of a card's weights in their repository, the preferred one first."""
    if card.hub_file is None:
        return CHECKPOINT, _PICKLED_CHECKPOINT
    return str(Path(card.hub_file).with_suffix(".safetensors")), card.hub_file
