"""The weights of a model: found on disk, in the hub's cache or on the hub, read and checked."""

from __future__ import annotations

import math
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
from clip_server.models import hub
from clip_server.models.state_dict_keys import is_used, to_open_clip_keys

Tensors = dict[str, NDArray[Any]]

CHECKPOINT = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
# Pickled checkpoints, which only torch reads.
_PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *_PICKLES)
# The same weights as open_clip's older repositories hold them.
_PICKLED_CHECKPOINT = "open_clip_pytorch_model.bin"
# And as transformers saves them.
_HUGGING_FACE = ("model.safetensors", "pytorch_model.bin")
# How the names end that a checkpoint may hold or lack: no tower needs them.
_HARMLESS = (
    *("attn_mask", "position_ids", "num_batches_tracked", "logit_bias"),
    # Numbers in OpenAI's archives.
    *("input_resolution", "context_length", "vocab_size"),
)
# What wraps a model puts this before the names of all its tensors: training on several GPUs,
# torch.compile, a Lightning module.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "clip_model.", "clip.")
_TRAINERS_KEYS = ("state_dict", "model_state_dict", "model")
# How torch names the first class that it does not make for a pickle.
_PICKLED_CLASS = re.compile(r"(?:GLOBAL|global) ([\w.]+)")
_SHOWN = 3


def find(card: ModelCard, model_path: str | Path | None = None) -> Path:
    """The checkpoint of a card, downloaded if it has to be.

    model_path: as in `local`; without it the file comes from the card's hub repository, or the
        cache of that.

    Raises:
        WeightsError: there is no such file, or the hub cannot be reached.
        ConfigurationError: there is only a pickled one, and torch is not installed.
    """
    if model_path is not None:
        return local(Path(model_path))
    if card.hub is None:
        raise WeightsError(f"{card.name} names no place to fetch weights from: give a model_path")
    return cached(card) or hub.download(card.hub, _hub_files(card), _check_readable)


def cached(card: ModelCard) -> Path | None:
    """The checkpoint of a card in the hub's cache, if it is there."""
    files = _hub_files(card) if card.hub else ()
    found = (hub.find_cached(card.hub, file) for file in files if card.hub)
    return next((path for path in found if path), None)


def local(path: Path) -> Path:
    """The checkpoint that a person's `model_path` means.

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
    """What is at a path where a checkpoint was expected, as the rest of a sentence."""
    if path.is_dir():
        return "is a folder without one, or with several"
    if path.is_symlink() and not path.exists():
        return "is a link to something that does not exist"
    return "is not a regular file" if path.exists() else "does not exist"


def in_folder(path: Path) -> Path | None:
    """The checkpoint in a folder, or the file itself; None where there is none or a choice."""
    if not path.is_dir():
        return path if path.is_file() else None
    for name in (CHECKPOINT, _PICKLED_CHECKPOINT, *_HUGGING_FACE):
        if (path / name).is_file():
            return path / name
    found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    return found[0] if len(found) == 1 else None


def read(path: Path) -> Tensors:
    """Every tensor of a checkpoint, as stored; bfloat16, which numpy lacks, as float32. A Hugging
    Face model's have open_clip's names (see `state_dict_keys`).

    Raises:
        WeightsError: the file is damaged, not a checkpoint at all, or holds code.
        ConfigurationError: it is pickled, and torch is not installed.
    """
    with _opened(path) as file:
        return to_open_clip_keys({name: file.tensor(name) for name in file.names})


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, by the names of whoever saved it. Errors are
    those of `read`."""
    with _opened(path) as file:
        return {name: file.shape(name) for name in file.names}


def read_logit_scale(path: Path) -> float:
    """The factor on cosines, exp(logit_scale), without reading the other tensors.

    Raises:
        WeightsError: as `read`, or the checkpoint holds no logit scale.
    """
    with _opened(path) as file:
        if "logit_scale" not in file.names:
            raise WeightsError(f"{path} is not a CLIP checkpoint: it has no logit_scale")
        scale = file.tensor("logit_scale")
    return float(np.exp(scale.astype(np.float64)).item())


def check(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a checkpoint is of the architecture whose tensors have `shapes`.

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
    """The tensors that a checkpoint should not have, or should: each fault, with theirs.

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

    names: of its tensors, without what the wrappers of a model put before them all; each with
        its name in the file.
    """

    def __init__(self, stored: Iterable[str]) -> None:
        self.names = {name: name for name in stored}
        while prefix := self._wrapper():
            self.names = {name.removeprefix(prefix): old for name, old in self.names.items()}

    def _wrapper(self) -> str | None:
        wraps = (each for each in _WRAPPERS if all(name.startswith(each) for name in self.names))
        return next(wraps, None) if self.names else None

    @abstractmethod
    def tensor(self, name: str) -> NDArray[Any]:
        """As stored, but bfloat16 as float32."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...


class _Safetensors(_Checkpoint):
    def __init__(self, file: Any) -> None:
        super().__init__(file.keys())
        self._file = file

    def tensor(self, name: str) -> NDArray[Any]:
        tensor: NDArray[Any] = self._file.get_tensor(self.names[name])
        return tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(self.names[name]).get_shape())


class _Pickle(_Checkpoint):
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self._tensors = tensors

    def tensor(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[self.names[name]]
        wide = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
        array: NDArray[Any] = wide.detach().numpy()
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[self.names[name]].shape)


@contextmanager
def _opened(path: Path) -> Iterator[_Checkpoint]:
    if path.suffix in _PICKLES:
        yield _Pickle(_unpickled(path))
        return
    try:
        with safe_open(path, framework="np") as file:
            yield _Safetensors(file)
    except PermissionError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged, or not a CLIP checkpoint ({error}): fetch or copy it again"
        ) from error


def _unpickled(path: Path) -> dict[str, Any]:
    """The torch tensors of a pickled checkpoint, read without running any code in it.

    Trainers write them under a key, beside the epoch and the optimizer.
    """
    torch = _torch(path)
    mapped = zipfile.is_zipfile(path)
    if mapped and _is_torchscript(path):
        raise WeightsError(
            f"{path} is a TorchScript archive, which holds code beside its tensors, and none is "
            f"run: save the tensors alone, torch.save(torch.jit.load({path.name!r}, "
            "map_location='cpu').state_dict(), 'weights.pt')"
        )
    try:
        # Mapped, so that a look at the shapes does not read gigabytes.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever the bytes of a damaged file make of it
        raise WeightsError(_explain(path, error)) from error
    under_keys = [found.get(key) for key in _TRAINERS_KEYS] if isinstance(found, dict) else []
    for held in (*under_keys, found):
        items = held.items() if isinstance(held, dict) else ()
        tensors = {name: value for name, value in items if isinstance(value, torch.Tensor)}
        if tensors:
            return tensors
    raise WeightsError(f"{path} is not a checkpoint: it holds no tensors by name")


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _explain(path: Path, error: Exception) -> str:
    """Why torch does not read a pickled checkpoint, and what to do about it."""
    if isinstance(error, PermissionError):
        return f"{path} cannot be read: {error.strerror}"
    if found := _PICKLED_CLASS.search(str(error)):
        return (
            f"{path} holds code beside its tensors ({found[1]}), which is not run: save the "
            "model's state_dict() alone, as .safetensors if you can"
        )
    return f"{path} is damaged, or not a checkpoint ({type(error).__name__}): copy it again"


def _check_readable(file: str) -> None:
    """Raises ConfigurationError for a pickle without torch: a download would be in vain."""
    if file.endswith(_PICKLES):
        _torch(file)


def _torch(path: Path | str) -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise ConfigurationError(
            f"only torch reads {path}: save the tensors as .safetensors, or {install_hint('torch')}"
        ) from error
    return torch


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hub_files(card: ModelCard) -> tuple[str, ...]:
    """The names that a card's weights may have in their repository, the best first."""
    if card.hub_file is None:
        return CHECKPOINT, _PICKLED_CHECKPOINT
    return str(Path(card.hub_file).with_suffix(".safetensors")), card.hub_file
