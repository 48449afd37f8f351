"""The weights of a model: found on disk, in the hub's cache or on the hub, read and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes  # with it, safetensors can give numpy arrays of bfloat16
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from clip_server.errors import WeightsError
from clip_server.models.card import ModelCard

Tensors = dict[str, NDArray[Any]]

CHECKPOINT = "open_clip_model.safetensors"
CONFIG = "open_clip_config.json"
# How long an unreachable hub may hold up the start, in seconds.
_HUB_TIMEOUT = 5.0
# How the names end that a checkpoint may hold or lack: no tower needs them.
_HARMLESS = ("attn_mask", "position_ids", "num_batches_tracked", "logit_bias")
_SHOWN = 3


def find(card: ModelCard, model_path: str | Path | None = None) -> Path:
    """The safetensors checkpoint of a card, downloaded if it has to be.

    model_path: a `.safetensors` file, or a folder with `open_clip_model.safetensors`; without
        it the file comes from the card's hub repository, or the cache of that.

    Raises:
        WeightsError: there is no such file, or the hub cannot be reached.
    """
    if model_path is not None:
        return local(Path(model_path))
    if card.hub is None:
        raise WeightsError(f"{card.name} names no place to fetch weights from: give a model_path")
    return _cached(card.hub) or _download(card.hub)


def local(path: Path) -> Path:
    """The checkpoint that a person's `model_path` means.

    Raises:
        WeightsError: it is neither a `.safetensors` file nor a folder with one.
    """
    file = path / CHECKPOINT if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(
            f"no checkpoint at {file}: model_path is a .safetensors file, or a folder with "
            f"{CHECKPOINT}"
        )
    if file.suffix != ".safetensors":
        raise WeightsError(
            f"{file} is not a .safetensors file; other checkpoints may hold code and are not read"
        )
    return file


def read(path: Path) -> Tensors:
    """Every tensor of a checkpoint, as stored; bfloat16, which numpy lacks, as float32.

    Raises:
        WeightsError: the file is damaged or not safetensors at all.
    """
    with _opened(path) as file:
        names = file.keys()
        return {name: _standard(file.get_tensor(name)) for name in names}


def read_logit_scale(path: Path) -> float:
    """The factor on cosines, exp(logit_scale), without reading the other tensors.

    Raises:
        WeightsError: the file is damaged, or holds no logit scale.
    """
    with _opened(path) as file:
        return float(np.exp(file.get_tensor("logit_scale").astype(np.float64)).item())


def check(tensors: Mapping[str, NDArray[Any]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a checkpoint is of the architecture whose tensors have `shapes`.

    Raises:
        WeightsError: tensors are missing, of another shape, or left over; names the first few.
    """
    missing = [
        f"{name} {shape}"
        for name, shape in shapes.items()
        if name not in tensors and not name.endswith(_HARMLESS)
    ]
    mismatched = [
        f"{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    left_over = [
        f"{name} {tensor.shape}"
        for name, tensor in tensors.items()
        if name not in shapes and not name.endswith(_HARMLESS)
    ]
    faults = {"missing": missing, "of another shape": mismatched, "not in the model": left_over}
    found = [f"{_first(names)} ({what})" for what, names in faults.items() if names]
    if found:
        raise WeightsError("the checkpoint is of another architecture: " + "; ".join(found))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is damaged, or not a CLIP checkpoint ({error}): fetch or copy it again"
        ) from error


def _standard(tensor: NDArray[Any]) -> NDArray[Any]:
    return tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor


def _first(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _SHOWN
    return ", ".join(listed[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _hub() -> ModuleType:
    """The hub's client, which reads its settings when it is first imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    return huggingface_hub


def _cached(repo: str) -> Path | None:
    path = _hub().try_to_load_from_cache(repo, CHECKPOINT)
    return Path(path) if isinstance(path, str) else None


def _download(repo: str) -> Path:
    hub = _hub()
    try:
        # hf_hub_download alone retries an unreachable hub for minutes; this asks once.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, CHECKPOINT), timeout=_HUB_TIMEOUT)
        return Path(hub.hf_hub_download(repo, CHECKPOINT, etag_timeout=_HUB_TIMEOUT))
    except Exception as error:  # each release of the client raises another library's errors
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> WeightsError:
    constants = _hub().constants
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return WeightsError(
        f"cannot get {CHECKPOINT} of {repo}: {reason}\n"
        f"  looked in the cache {constants.HF_HUB_CACHE} (HF_HOME) and then at "
        f"{constants.ENDPOINT} (HF_ENDPOINT)\n"
        "  with no network, copy the file over and give its model_path, or use the embedded "
        "model, which needs none: name: embedded, or CLIP_MODEL=embedded"
    )
