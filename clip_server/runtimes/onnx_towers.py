"""Towers of a checkpoint, or of a folder of graphs, as graphs of onnxruntime.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import runtimes
from clip_server.errors import ConfigurationError
from clip_server.install import IMPORT_ERRORS, import_failure
from clip_server.launch.process_setup import die_with_parent
from clip_server.model_card import ModelCard, Precision
from clip_server.models import converted, exported, weights, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes import memory, prepared
from clip_server.runtimes.loading import load_checkpoint
from clip_server.runtimes.onnx_graph import Graph, ImageGraph, TextGraph
from clip_server.runtimes.onnx_sessions import SessionError, Sessions
from clip_server.runtimes.onnx_tables import Table, pays

try:
    import onnx
    from google.protobuf.message import DecodeError

    from clip_server.towers import graph, lookups, onnx_file, registry
    from clip_server.towers.builder import Store
    from clip_server.towers.tower import Target
except IMPORT_ERRORS as error:
    raise ConfigurationError(import_failure(error, "the onnx package", "onnx")) from error

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

    card, files: of the model; the files are its checkpoint or its graphs.
    source: the name and model_path that it is loaded by, as in `load_runtime`.
    settings: all else that the towers depend on, as JSON.
    weight_bytes: in the precision of the towers.
    external: other files, which hold weights of its graphs.
    """

    def __init__(
        self,
        card: ModelCard,
        files: Sequence[Path],
        *,
        source: tuple[str, str | Path | None],
        precision: str,
        settings: Mapping[str, Any],
        weight_bytes: int,
        sessions: Sessions,
        external: Sequence[Path] = (),
    ) -> None:
        self.card, self.files = card, [*files, *external]
        self._external = external
        self._source = source[0], str(source[1] or "")
        self._precision, self._settings, self._bytes = precision, settings, weight_bytes
        self._sessions = sessions
        self._on_cpu = self._uses_cache = sessions.device == "cpu"
        self._folder: Path | None = None
        self._opened: set[Tower] = set()

    @abstractmethod
    def origin(self, tower: Tower, /) -> str:
        """Names a tower in error messages."""

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

    def open_images(self) -> ImageGraph:
        """Opens the image tower."""
        return ImageGraph(self._open("image"), self.card.image)

    def open_texts(self) -> TextGraph:
        """Opens the text tower."""
        return TextGraph(self._open("text"), self.card.text)

    def _open(self, tower: Tower) -> Graph:
        # Looked at again if the tower was unloaded: its files may be damaged or gone by now.
        is_known = self._folder is not None and self._folder.is_dir() and tower not in self._opened
        if self._uses_cache and not is_known:
            self._folder = self._cached()
            self._uses_cache = self._folder is not None
        self._opened.add(tower)
        if self._folder is None:
            return self.open_unprepared(tower)
        return self._open_prepared(self._folder / f"{tower}.onnx", tower)

    def _open_prepared(self, path: Path, tower: Tower) -> Graph:
        tables = [Table(lookup) for lookup in lookups.find(path) if pays(lookup)]
        return self._sessions.open_prepared(path, self.origin(tower), tables)

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
            return prepared.find_or_make(
                card.name, self.files, settings, make, needed, self._external
            )
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
            ConfigurationError: a graph is not of a tower.
        """
        for tower in TOWERS:
            self._prepare_tower(tower, folder)

    def _prepare_tower(self, tower: Tower, folder: Path) -> None:
        graph, kept = self.graph_file(tower, folder), folder / f"{tower}.onnx"
        try:
            unprepared = self._sessions.prepare(graph, kept, self.origin(tower))
            expected = self._try_out(tower, unprepared)
            del unprepared
            onnx_file.align(kept)
            opened = self._open_prepared(kept, tower)
        except SessionError as error:  # of a disk that is full, too
            raise prepared.CacheError(str(error)) from error
        found = self._try_out(tower, opened)
        if not np.abs(found - expected).max() <= _ROUNDING * np.abs(expected).max():
            raise prepared.CacheError("the prepared model computes other embeddings")
        if graph.parent == folder:
            graph.unlink()
            graph.with_name(f"{graph.name}.data").unlink()

    def _try_out(self, tower: Tower, graph: Graph) -> NDArray[np.float32]:
        """The embeddings of samples."""
        if tower == "image":
            return ImageGraph(graph, self.card.image).try_out(self.card)
        return TextGraph(graph, self.card.text).try_out(self.card)


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
            source=(name, model_path),
            precision=precision,
            settings={"config": card.config, "image": card.image},
            weight_bytes=cost.memory[precision] if cost else 0,
            sessions=sessions,
        )
        self._build_in = precision
        self._target: Target = "onnxruntime" if self._on_cpu else "onnxruntime-cuda"

    def origin(self, _: Tower, /) -> str:
        return f"a graph of {self.card.name}"

    def graph_file(self, tower: Tower, folder: Path, /) -> Path:
        built = folder / "built.onnx"
        with built.with_name(f"{built.name}.data").open("wb") as data:
            model = self._build(tower, onnx_file.DataFile(data))
        built.write_bytes(model.SerializeToString())
        return built

    def open_unprepared(self, tower: Tower) -> Graph:
        store = onnx_file.ArrayStore()
        model = self._build(tower, store).SerializeToString()
        return self._sessions.open(model, self.origin(tower), store.arrays)

    def _build(self, tower: Tower, store: Store) -> onnx.ModelProto:
        card, tensors = self.card, self._tensors
        build: Callable[..., onnx.ModelProto] = (
            partial(graph.build_visual, image=card.image)
            if tower == "image"
            else partial(graph.build_textual, target=self._target)
        )
        return build(card.config, tensors, precision=self._build_in, store=store)


class FolderTowers(Towers):
    """The towers in a folder: graphs of the convert command, or anyone's.

    The declarations of anyone's are not reliable, so that they are tried whenever they are opened.

    name, model_path: as in `zoo.resolve`. own: the folder that they name.

    Raises:
        ConfigurationError: its card or its configuration cannot be read.
    """

    def __init__(
        self,
        name: str,
        model_path: str | Path | None,
        own: runtimes.OwnTowers,
        sessions: Sessions,
    ) -> None:
        described = converted.read(own.folder)
        card, precision = described or (zoo.resolve(name, model_path), own.precision or "")
        files = [*own.files.values()]
        external = [*_external_files(files)]
        super().__init__(
            card,
            files,
            source=(card.name, own.folder),
            precision=precision,
            settings={},
            weight_bytes=sum(file.stat().st_size for file in (*files, *external)),
            sessions=sessions,
            external=external,
        )
        self._graphs, self._is_described = own.files, described is not None
        self._dims: dict[Tower, int] = {}

    def origin(self, tower: Tower, /) -> str:
        return str(self._graphs[tower])

    def graph_file(self, tower: Tower, _: Path, /) -> Path:
        return self._graphs[tower]

    def open_unprepared(self, tower: Tower) -> Graph:
        return self._sessions.open(self._graphs[tower], self.origin(tower))

    def open_images(self) -> ImageGraph:
        opened = super().open_images()
        if not self._is_described:
            self._check_dim("image", opened.try_out(self.card))
        return opened

    def open_texts(self) -> TextGraph:
        opened = super().open_texts()
        if not self._is_described:
            self._check_dim("text", opened.try_out(self.card))
        return opened

    def _check_dim(self, tower: Tower, embeddings: NDArray[np.float32]) -> None:
        """Takes over the dimensions of a tower's embeddings [B, D].

        Raises:
            ConfigurationError: the other tower's differ, as of different models.
        """
        dims = self._dims | {tower: embeddings.shape[1]}
        if len(set(dims.values())) > 1:
            raise ConfigurationError(
                f"{self.origin('image')} has embeddings of {dims['image']} dimensions, and "
                f"{self.origin('text')} of {dims['text']}: they are of different models"
            )
        self._dims, self.card = dims, replace(self.card, dim=dims[tower])


def _external_files(graphs: Iterable[Path]) -> Iterator[Path]:
    """The files that hold weights of graphs."""
    for graph in graphs:
        if graph.stat().st_size <= exported.MAX_WITHOUT_WEIGHTS:
            with suppress(DecodeError):  # it is not a graph, as onnxruntime will say
                files = (graph.parent / name for name in onnx_file.external_files(graph))
                yield from filter(Path.is_file, files)


def _prepare_for_parent(
    name: str, model_path: str, precision: Precision, threads: str, folder: str
) -> int:
    """The process that `Towers` starts: its exit status. The reason is on stderr."""
    die_with_parent()
    try:
        sessions = Sessions("cpu", int(threads), precision)
        own = runtimes.find("onnx").own_towers(name, model_path or None, precision or None)
        towers = (
            FolderTowers(name, model_path or None, own, sessions)
            if own
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
