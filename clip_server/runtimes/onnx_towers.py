"""Towers of a checkpoint as graphs of onnxruntime.

On a CPU they come from the cache of prepared models, where their weights have the layout that
onnxruntime computes with, and are mapped. Otherwise they are built, and their weights handed over
as arrays that are mapped from the checkpoint where nothing has to be converted.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ConfigurationError
from clip_server.model_card import ModelCard, Precision
from clip_server.models import weights
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import prepared
from clip_server.runtimes.onnx_graph import Graph
from clip_server.runtimes.onnx_sessions import NOT_INSTALLED, Sessions
from clip_server.runtimes.samples import samples

try:
    import onnx

    from clip_server.towers import graph, onnx_file, registry
    from clip_server.towers.builder import Store
except ImportError as missing:
    raise ConfigurationError(NOT_INSTALLED) from missing

log = logging.getLogger(__name__)

# The most that preparing takes on the disk, in checkpoints: a tower as built, and in both layouts,
# as onnxruntime writes it and as it is kept.
_DISK_FACTOR = 5
# The largest difference, as a share of the largest value, between a tower and the same prepared.
_ROUNDING = 1e-4


class Towers:
    """Opens the towers of a checkpoint.

    card, tensors: of the checkpoint. precision: that the graphs are built in.
    """

    def __init__(
        self,
        card: ModelCard,
        tensors: weights.CheckpointTensors,
        precision: Precision,
        sessions: Sessions,
    ) -> None:
        self._card, self._tensors, self._precision = card, tensors, precision
        self._sessions = sessions
        self._origin = f"a graph of {card.name}"

    def open(self) -> Iterator[Graph]:
        """The image and the text tower.

        Raises:
            WeightsError, ConfigurationError: the checkpoint is of another architecture, or one
                that only torch can build.
        """
        folder = self._cached() if self._sessions.device == "cpu" else None
        for tower in TOWERS:
            if folder is None:
                yield self._open_built(tower)
            else:
                yield self._sessions.open_prepared(folder / f"{tower}.onnx", self._origin)

    def _cached(self) -> Path | None:
        """The folder with the prepared towers; None, after a warning, if they cannot be kept."""
        card = self._card
        settings = {
            "precision": self._precision,
            "config": card.config,
            "image": card.image,
            "onnxruntime": self._sessions.version(),
        }
        files = self._tensors.files
        needed = _DISK_FACTOR * sum(file.stat().st_size for file in files)
        try:
            return prepared.find_or_make(card.name, files, settings, self._prepare, needed)
        except prepared.CacheError as error:
            log.warning(
                "%s is prepared in memory, by every replica at every start, because it cannot be "
                "cached: %s; set XDG_CACHE_HOME to another folder",
                card.name,
                error,
            )
            return None

    def _prepare(self, folder: Path) -> None:
        """Writes both towers as `open_prepared` takes them."""
        for tower in TOWERS:
            self._prepare_tower(tower, folder)

    def _prepare_tower(self, tower: Tower, folder: Path) -> None:
        built, saved, kept = (folder / f"{name}.onnx" for name in ("built", "saved", tower))
        with built.with_name(f"{built.name}.data").open("wb") as data:
            model = self._build(tower, onnx_file.DataFile(data))
        built.write_bytes(model.SerializeToString())
        self._tensors.release()
        batch = samples(self._card, tower)[:1]
        try:
            expected = _run(self._sessions.prepare(built, saved, self._origin), batch)
            onnx_file.align(saved, kept)
            found = _run(self._sessions.open_prepared(kept, self._origin), batch)
        except ConfigurationError as error:  # of a disk that is full, too
            raise prepared.CacheError(str(error)) from error
        if not np.abs(found - expected).max() <= _ROUNDING * np.abs(expected).max():
            raise prepared.CacheError("the prepared model computes other embeddings")
        for file in (built, saved):
            file.unlink()
            file.with_name(f"{file.name}.data").unlink(missing_ok=True)
        _return_freed_memory()

    def _open_built(self, tower: Tower) -> Graph:
        store = onnx_file.ArrayStore()
        model = self._build(tower, store).SerializeToString()
        opened = self._sessions.open(model, self._origin, store.arrays)
        store.arrays.clear()
        self._tensors.release()
        return opened

    def _build(self, tower: Tower, store: Store) -> onnx.ModelProto:
        card, tensors = self._card, self._tensors
        weights.check(tensors, registry.tensor_shapes(card.config))
        build: Callable[..., onnx.ModelProto] = (
            partial(graph.build_visual, image=card.image)
            if tower == "image"
            else graph.build_textual
        )
        return build(card.config, tensors, precision=self._precision, store=store)


def _return_freed_memory() -> None:
    """Gives back to the system what laying out weights took, before the next tower (glibc only)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _run(opened: Graph, batch: NDArray[Any]) -> NDArray[np.float32]:
    (name,) = opened.inputs
    return opened.run({name: batch})
