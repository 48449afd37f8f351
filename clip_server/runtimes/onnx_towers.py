"""Towers of a checkpoint, or of a converted folder, as graphs of onnxruntime.

On a CPU they come from the cache of prepared models, where their weights have the layout that
onnxruntime computes with, and are mapped. A process of its own prepares them, so that the memory
which that takes is not the server's. Otherwise those of a checkpoint are built, and their weights
handed over as arrays that are mapped from it where nothing has to be converted.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.launch.process_setup import die_with_parent
from clip_server.model_card import ModelCard, Precision
from clip_server.models import converted, weights, zoo
from clip_server.models.converted import TOWERS, Converted, Tower
from clip_server.runtimes import memory, prepared
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx_graph import Graph
from clip_server.runtimes.onnx_sessions import NOT_INSTALLED, Sessions
from clip_server.runtimes.samples import samples

try:
    import onnx

    from clip_server.towers import graph, onnx_file, registry
    from clip_server.towers.builder import Store
    from clip_server.towers.tower import Target
except ImportError as missing:
    raise ConfigurationError(NOT_INSTALLED) from missing

log = logging.getLogger(__name__)

# The most that preparing takes on the disk, in weights of the model: as built, and in the two
# layouts that onnxruntime writes.
_DISK_FACTOR = 3
# The largest difference, as a share of the largest value, between a tower and the same prepared.
_ROUNDING = 1e-4
# Weights of this many bytes and more are prepared in a process of its own, which takes a second to
# start.
_LARGE = 128 << 20
# The exit status of that process: the model cannot be served like this; the cache cannot keep it.
_REFUSED, _NOT_CACHED = 78, 73


class Towers(ABC):
    """Opens the towers of a model.

    card, files: of the model; the files hold its weights.
    origin: names the towers in error messages. source: the name and model_path that it was loaded
        by, as in `load_runtime`. settings: all else that the towers depend on, as JSON.
    weight_bytes: in the precision of the towers.
    """

    def __init__(
        self,
        card: ModelCard,
        files: Sequence[Path],
        *,
        origin: str,
        source: tuple[str, str | Path | None],
        precision: str,
        settings: Mapping[str, Any],
        weight_bytes: int,
        sessions: Sessions,
    ) -> None:
        self.card, self.files = card, files
        self._origin, self._source = origin, (source[0], str(source[1] or ""))
        self._precision, self._settings, self._bytes = precision, settings, weight_bytes
        self._sessions = sessions
        self._on_cpu = self._uses_cache = sessions.device == "cpu"
        self._folder: Path | None = None

    @abstractmethod
    def graph_file(self, tower: Tower, folder: Path, /) -> Path:
        """The file with a tower's graph, which may be written into a folder."""

    @abstractmethod
    def open_unprepared(self, tower: Tower) -> Graph:
        """Opens a tower without the cache."""

    def check_memory(self) -> None:
        """Raises ConfigurationError if the memory is too small for both towers on the CPU."""
        if self._on_cpu:
            memory.check(self.card.name, self._bytes)

    def open(self, tower: Tower) -> Graph:
        """Opens a tower."""
        was_cleared = self._folder is not None and not self._folder.is_dir()
        if self._uses_cache and (self._folder is None or was_cleared):
            self._folder = self._cached()
            self._uses_cache = self._folder is not None
        if self._folder is None:
            return self.open_unprepared(tower)
        return self._sessions.open_prepared(self._folder / f"{tower}.onnx", self._origin)

    def _cached(self) -> Path | None:
        """The folder with the prepared towers; None, after a warning, if they cannot be kept."""
        card = self.card
        settings = {
            **self._settings,
            "precision": self._precision,
            "onnxruntime": self._sessions.version(),
        }
        make = self.prepare if self._bytes < _LARGE else self._prepare_apart
        needed = _DISK_FACTOR * self._bytes
        try:
            return prepared.find_or_make(card.name, self.files, settings, make, needed)
        except prepared.CacheError as error:
            log.warning(
                "%s is prepared in memory, by every replica at every start, because it cannot be "
                "cached: %s; set XDG_CACHE_HOME to another folder",
                card.name,
                error,
            )
            return None

    def _prepare_apart(self, folder: Path) -> None:
        """Does what `prepare` does in another process."""
        arguments = [*self._source, self._precision, str(self._sessions.threads), str(folder)]
        process = subprocess.run(
            [sys.executable, "-m", __name__, *arguments],
            # Python finds there what it finds here.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        status, lines = process.returncode, process.stderr.strip().splitlines()
        message = lines[-1] if lines else "it gave no reason"
        if status == -signal.SIGKILL:
            name, figures = self.card.name, memory.describe(self._bytes)
            raise ConfigurationError(f"{name} was killed while it was prepared: {figures}")
        if status == _REFUSED:
            raise ConfigurationError(message)
        if status == _NOT_CACHED:
            raise prepared.CacheError(message)
        if status < 0:
            raise prepared.CacheError(f"preparing it ended by {signal.Signals(-status).name}")
        if status:
            raise prepared.CacheError(f"preparing it failed: {message}")

    def prepare(self, folder: Path) -> None:
        """Writes both towers as `open_prepared` takes them.

        Raises:
            CacheError: the disk is full, or the prepared towers compute something else.
        """
        for tower in TOWERS:
            self._prepare_tower(tower, folder)

    def _prepare_tower(self, tower: Tower, folder: Path) -> None:
        graph, kept = self.graph_file(tower, folder), folder / f"{tower}.onnx"
        batch = samples(self.card, tower)[:1]
        try:
            expected = _run(self._sessions.prepare(graph, kept, self._origin), batch)
            onnx_file.align(kept)
            found = _run(self._sessions.open_prepared(kept, self._origin), batch)
        except ConfigurationError as error:  # of a disk that is full, too
            raise prepared.CacheError(str(error)) from error
        if not np.abs(found - expected).max() <= _ROUNDING * np.abs(expected).max():
            raise prepared.CacheError("the prepared model computes other embeddings")
        if graph.parent == folder:
            graph.unlink()
            graph.with_name(f"{graph.name}.data").unlink()


class CheckpointTowers(Towers):
    """Builds the towers of a checkpoint.

    name, model_path: as in `load_checkpoint`. precision: that the graphs are built in.

    Raises:
        UnknownModelError, WeightsError: as `load_checkpoint`.
        ConfigurationError: only torch can build the towers.
    """

    def __init__(
        self, name: str, model_path: str | Path | None, precision: Precision, sessions: Sessions
    ) -> None:
        card, self._tensors = load_checkpoint(name, model_path)
        weights.check(self._tensors, registry.tensor_shapes(card.config))
        cost = zoo.cost(card)
        super().__init__(
            card,
            self._tensors.files,
            origin=f"a graph of {card.name}",
            source=(name, model_path),
            precision=precision,
            settings={"config": card.config, "image": card.image},
            weight_bytes=cost.memory[precision] if cost else 0,
            sessions=sessions,
        )
        self._build_in = precision
        self._target: Target = "onnxruntime" if self._on_cpu else "onnxruntime-cuda"

    def graph_file(self, tower: Tower, folder: Path, /) -> Path:
        built = folder / "built.onnx"
        with built.with_name(f"{built.name}.data").open("wb") as data:
            model = self._build(tower, onnx_file.DataFile(data))
        built.write_bytes(model.SerializeToString())
        return built

    def open_unprepared(self, tower: Tower) -> Graph:
        store = onnx_file.ArrayStore()
        model = self._build(tower, store).SerializeToString()
        return self._sessions.open(model, self._origin, store.arrays)

    def _build(self, tower: Tower, store: Store) -> onnx.ModelProto:
        card, tensors = self.card, self._tensors
        build: Callable[..., onnx.ModelProto] = (
            partial(graph.build_visual, image=card.image)
            if tower == "image"
            else partial(graph.build_textual, target=self._target)
        )
        return build(card.config, tensors, precision=self._build_in, store=store)


class ConvertedTowers(Towers):
    """The towers in a folder that the convert command wrote.

    graphs: their files. found: the content of the folder's card.
    """

    def __init__(self, graphs: Mapping[Tower, Path], found: Converted, sessions: Sessions) -> None:
        folder = graphs["image"].parent
        data = (file.with_name(f"{file.name}.data") for file in graphs.values())
        files = [*graphs.values(), *filter(Path.is_file, data)]
        super().__init__(
            found.card,
            files,
            origin=str(folder),
            source=("", folder),
            precision=found.precision,
            settings={},
            weight_bytes=sum(file.stat().st_size for file in files),
            sessions=sessions,
        )
        self._graphs = graphs

    def graph_file(self, tower: Tower, _: Path, /) -> Path:
        return self._graphs[tower]

    def open_unprepared(self, tower: Tower) -> Graph:
        file = self._graphs[tower]
        return self._sessions.open(file, str(file))


def _run(opened: Graph, batch: NDArray[Any]) -> NDArray[np.float32]:
    (name,) = opened.inputs
    return opened.run({name: batch})


def _prepare_for_parent(
    name: str, model_path: str, precision: Precision, threads: str, folder: str
) -> int:
    """The process that `Towers` starts: its exit status. The reason is on stderr."""
    die_with_parent()
    try:
        sessions = Sessions("cpu", int(threads), precision)
        own = runtimes.find("onnx").own_towers(name, model_path or None, precision)
        described = converted.read(own.folder) if own else None
        towers = (
            ConvertedTowers(own.files, described, sessions)
            if own and described
            else CheckpointTowers(name, model_path or None, precision, sessions)
        )
        towers.prepare(Path(folder))
    except ConfigurationError as error:
        print(_one_line(error), file=sys.stderr)
        return _REFUSED
    except (prepared.CacheError, OSError) as error:
        print(_one_line(error), file=sys.stderr)
        return _NOT_CACHED
    return 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(_prepare_for_parent(*sys.argv[1:]))  # type: ignore[arg-type]
