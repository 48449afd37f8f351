"""Parts of a local collection that are searched: rows in memory, and the index on disk.

A segment holds vectors in ascending order of their rows' numbers. `position` counts them.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from clip_server.search.filters import Condition
from clip_server.search.rows import Numbers
from clip_server.search.store import IndexMethod, Metric, Vectors

Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
# Rows' numbers, modalities and vectors.
Batch = tuple[Numbers, NDArray[np.uint8], Vectors]
# What faiss puts where it found fewer than asked for.
_NONE = -1
_INDEX, _INFO = "faiss.index", "info.json"

# Rows above which clusters pay for the recall they cost.
FLAT_ROWS = 10_000
# Vectors that one cluster is trained on.
_TRAINED_PER_CLUSTER = 48
_TRAINING_ROUNDS = 10
_ADDED_AT_ONCE = 256
# Vectors whose neighbours tune an index, the neighbours of each, and the part that is found.
_TUNED_ON, _NEIGHBOURS, _RECALL = 200, 10, 0.98
# Queries are less like the rows than rows are like each other, texts among images above all.
_QUERY_MARGIN = 2
_WIDEST_HNSW_SEARCH = 1024
# Of a graph: below this part of the rows, comparing all that fulfil a filter is faster.
_EXACT_PART = 0.2


def prepare(vectors: Vectors, metric: Metric) -> Vectors:
    """Vectors as they are indexed and compared: of length 1 for COSINE."""
    vectors = np.ascontiguousarray(vectors, np.float32)
    if metric != "COSINE":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths[lengths == 0] = 1.0
    unit: Vectors = (vectors / lengths).astype(np.float32)
    return unit


class Segment(ABC):
    """Vectors that are searched together.

    numbers, modalities: of each position.
    alive: whether the row at a position still exists.
    """

    numbers: Numbers
    modalities: NDArray[np.uint8]
    alive: Mask

    @abstractmethod
    def search(
        self, queries: Vectors, count: int, allowed: Mask | None
    ) -> tuple[Vectors, Positions]:
        """Scores and positions of the closest, [Q, count] each, closest first; -1 in place of
        those that are missing. allowed: positions that may be found; None: all.

        A score is larger the closer it is: the inner product, or the negative squared distance.
        """

    def remove(self, numbers: Numbers) -> None:
        """Marks rows as gone. Numbers of other segments are ignored."""
        places = np.searchsorted(self.numbers, numbers)
        places = np.minimum(places, max(len(self.numbers) - 1, 0))
        if len(self.numbers):
            self.alive[places[self.numbers[places] == numbers]] = False

    @property
    def last(self) -> int:
        """The greatest number, or 0 where there is none."""
        return int(self.numbers[-1]) if len(self.numbers) else 0


class MemorySegment(Segment):
    """The rows that the index does not hold yet, which are searched exactly.

    Never changed but for `alive`: `with_rows` returns a longer one, which shares the memory.
    """

    def __init__(
        self,
        metric: Metric,
        numbers: Numbers,
        modalities: NDArray[np.uint8],
        vectors: Vectors,
        alive: Mask | None = None,
    ) -> None:
        self._metric = metric
        given = np.ones(len(numbers), np.bool_) if alive is None else alive
        # Longer than the segment where rows can be appended in place.
        self._buffers: tuple[NDArray[Any], ...] = (numbers, modalities, vectors, given)
        self._expose(len(numbers))

    @classmethod
    def empty(cls, dim: int, metric: Metric) -> MemorySegment:
        """One without rows."""
        vectors = np.empty((0, dim), np.float32)
        return cls(metric, np.empty(0, np.int64), np.empty(0, np.uint8), vectors)

    def with_rows(
        self, numbers: Numbers, modalities: NDArray[np.uint8], vectors: Vectors
    ) -> MemorySegment:
        """The same with more rows, of greater numbers; only once of each segment. vectors:
        prepared, [n, D]."""
        longer = copy(self)
        count, total = len(self.numbers), len(self.numbers) + len(numbers)
        if total > len(self._buffers[0]):
            longer._buffers = tuple(_enlarged(each, count, total) for each in self._buffers)
        added: tuple[NDArray[Any], ...] = (numbers, modalities, vectors, np.ones_like(numbers))
        for buffer, new in zip(longer._buffers, added, strict=True):
            buffer[count:total] = new
        longer._expose(total)
        return longer

    def _expose(self, count: int) -> None:
        numbers, modalities, vectors, alive = self._buffers
        self.numbers, self.modalities = numbers[:count], modalities[:count]
        self._vectors, self.alive = vectors[:count], alive[:count]

    def after(self, number: int) -> MemorySegment:
        """The rows beyond a number, in memory of their own."""
        start = int(np.searchsorted(self.numbers, number, "right"))
        return MemorySegment(
            self._metric,
            self.numbers[start:].copy(),
            self.modalities[start:].copy(),
            self._vectors[start:].copy(),
            self.alive[start:].copy(),
        )

    def search(
        self, queries: Vectors, count: int, allowed: Mask | None
    ) -> tuple[Vectors, Positions]:
        scores = queries @ self._vectors.T
        if self._metric == "L2":
            scores = 2 * scores - (self._vectors**2).sum(axis=1)
            scores -= (queries**2).sum(axis=1)[:, None]
        if allowed is not None:
            scores[:, ~allowed] = -np.inf
        return _best(scores, min(count, len(self.numbers)))


def _enlarged(buffer: NDArray[Any], count: int, total: int) -> NDArray[Any]:
    larger = np.empty((max(total, 2 * len(buffer), 1024), *buffer.shape[1:]), buffer.dtype)
    larger[:count] = buffer[:count]
    return larger


@dataclass(frozen=True)
class IndexInfo:
    """Metadata of a saved index.

    method: `Flat`, `IVF1024` or `HNSW32`.
    search_width: clusters that are probed, or the breadth of a search in a graph.
    trained_rows: rows there were when clusters were formed.
    checksum: CRC-32 of the files, by name.
    """

    method: str
    metric: Metric
    dim: int
    search_width: int
    trained_rows: int
    checksum: dict[str, int]


class AnnSegment(Segment):
    """An index of faiss in a folder, memory-mapped and never changed."""

    def __init__(
        self,
        folder: Path,
        index: Any,
        info: IndexInfo,
        numbers: Numbers,
        modalities: NDArray[np.uint8],
    ) -> None:
        self.folder = folder
        self.info = info
        # Rows that fulfil a filter, by the filter: those of a segment never change.
        self.masks: OrderedDict[Condition, Mask] = OrderedDict()
        self.numbers, self.modalities = numbers, modalities
        self.alive = np.ones(len(numbers), np.bool_)
        self._index = index

    @classmethod
    def load(cls, folder: Path) -> AnnSegment:
        """The index in a folder. Raises OSError, ValueError or RuntimeError where it is damaged."""
        info = IndexInfo(**json.loads((folder / _INFO).read_text("utf-8")))
        for name, checksum in info.checksum.items():
            if _checksum(folder / name) != checksum:
                raise ValueError(f"{name} is damaged")
        index = faiss.read_index(str(folder / _INDEX), faiss.IO_FLAG_MMAP_IFC)
        numbers, modalities = np.load(folder / "numbers.npy"), np.load(folder / "modalities.npy")
        if not index.ntotal == len(numbers) == len(modalities):
            raise ValueError("the files are of different indexes")
        return cls(folder, index, info, numbers, modalities)

    @property
    def method(self) -> IndexMethod:
        """The search parameters."""
        return IndexMethod.parse(self.info.method)

    def writable(self) -> Any:
        """A copy of faiss's index that can be extended."""
        return faiss.read_index(str(self.folder / _INDEX))

    def search(
        self, queries: Vectors, count: int, allowed: Mask | None
    ) -> tuple[Vectors, Positions]:
        total = len(self.numbers)
        part = 1.0 if allowed is None else float(np.count_nonzero(allowed)) / max(total, 1)
        count = min(count, total)
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)
        index = self._index
        if self.method.kind == "HNSW" and part < _EXACT_PART:
            index = index.storage
            parameters = faiss.SearchParameters(sel=selector)
        else:
            width = max(self.info.search_width, count)
            parameters = _search_parameters(self.method, width / max(part, 1e-9), total, selector)
        distances, positions = index.search(queries, count, params=parameters)
        # The bitmap lives as long as the search.
        del selector, bits
        return (-distances if self.info.metric == "L2" else distances), positions


def build(
    read: Callable[[], Iterable[Batch]],
    rows: int,
    *,
    wanted: IndexMethod,
    metric: Metric,
    dim: int,
    base: AnnSegment | None,
    folder: Path,
    check: Callable[[], None],
) -> None:
    """Writes the index of rows into a folder, which is complete once it exists.

    read: the rows, ascending, with prepared vectors; it may be called several times.
    rows: their number, about.
    base: an index that is extended by them; None: there is none.
    check: called often; what it raises ends the work.
    """
    if base is not None:
        index, method, trained = base.writable(), base.method, base.info.trained_rows
        numbers, modalities = [base.numbers], [base.modalities]
    else:
        method, trained = resolve(wanted, rows), rows
        index = _new_index(method, metric, dim, read)
        numbers, modalities = [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    for batch_numbers, batch_modalities, vectors in read():
        for start in range(0, len(vectors), _ADDED_AT_ONCE):
            check()
            index.add(vectors[start : start + _ADDED_AT_ONCE])
        numbers.append(batch_numbers)
        modalities.append(batch_modalities)
    info = IndexInfo(str(method), metric, dim, _tune(index, method, check), trained, {})
    _save(folder, index, np.concatenate(numbers), np.concatenate(modalities), info)


def resolve(wanted: IndexMethod, rows: int) -> IndexMethod:
    """A method with `auto` and the number of clusters chosen for so many rows."""
    kind = wanted.kind
    if kind == "auto":
        kind = "Flat" if rows < FLAT_ROWS else "IVF"
    if kind == "IVF":
        most = max(rows // _TRAINED_PER_CLUSTER, 1)
        clusters = wanted.size if wanted.kind == "IVF" else 0
        return IndexMethod("IVF", max(min(clusters or int(4 * rows**0.5), most), 2))
    return IndexMethod(kind, wanted.size)


def _new_index(
    method: IndexMethod, metric: Metric, dim: int, read: Callable[[], Iterable[Batch]]
) -> Any:
    measure = faiss.METRIC_L2 if metric == "L2" else faiss.METRIC_INNER_PRODUCT
    if method.kind == "Flat":
        return faiss.IndexFlat(dim, measure)
    if method.kind == "HNSW":
        index = faiss.IndexHNSWFlat(dim, method.size, measure)
        index.hnsw.efConstruction = max(40, 4 * method.size)
        return index
    index = faiss.index_factory(dim, f"IVF{method.size},Flat", measure)
    index.cp.niter = _TRAINING_ROUNDS
    index.cp.min_points_per_centroid = 1
    index.cp.max_points_per_centroid = _TRAINED_PER_CLUSTER
    index.train(_training_vectors(method.size, dim, read))
    return index


def _training_vectors(clusters: int, dim: int, read: Callable[[], Iterable[Batch]]) -> Vectors:
    """Vectors drawn evenly from all, as many as the clusters are trained on."""
    total = sum(len(numbers) for numbers, _, _ in read())
    step = max(total // (clusters * _TRAINED_PER_CLUSTER), 1)
    training = np.concatenate(
        [np.empty((0, dim), np.float32), *(vectors[::step] for _, _, vectors in read())]
    )
    if len(training) >= clusters:
        return training
    # Clusters need as many vectors; a collection that small is searched whole in any case.
    filling = np.random.default_rng(0).normal(size=(clusters, dim)).astype(np.float32)
    return np.concatenate([training, filling])


def _search_parameters(method: IndexMethod, width: float, rows: int, selector: Any) -> Any:
    if method.kind == "IVF":
        nprobe = int(min(max(width, 1), method.size))
        return faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)
    if method.kind == "HNSW":
        ef = int(min(max(width, 1), max(rows, 1)))
        return faiss.SearchParametersHNSW(efSearch=ef, sel=selector)
    return faiss.SearchParameters(sel=selector)


def _tune(index: Any, method: IndexMethod, check: Callable[[], None]) -> int:
    """The width of a search: twice the smallest that finds `_RECALL` of a sample's neighbours."""
    if method.kind == "Flat" or not index.ntotal:
        return 1
    widest = method.size if method.kind == "IVF" else min(_WIDEST_HNSW_SEARCH, index.ntotal)
    if method.kind == "IVF":
        index.make_direct_map()
    picked = np.linspace(0, index.ntotal - 1, min(_TUNED_ON, index.ntotal)).astype(np.int64)
    queries = index.reconstruct_batch(picked)
    if method.kind == "IVF":
        index.set_direct_map_type(faiss.DirectMap.NoMap)
    # The first neighbour of each is itself, which any search finds.
    count = min(_NEIGHBOURS + 1, index.ntotal)
    exact = index.storage if method.kind == "HNSW" else index
    parameters = _search_parameters(method, widest, index.ntotal, None)
    _, true = exact.search(queries, count, params=parameters if exact is index else None)
    width = 1 if method.kind == "IVF" else 16
    while width < widest:
        check()
        parameters = _search_parameters(method, width, index.ntotal, None)
        _, found = index.search(queries, count, params=parameters)
        same = sum(len(np.intersect1d(a[1:], b[1:])) for a, b in zip(true, found, strict=True))
        if same >= _RECALL * true[:, 1:].size:
            return min(_QUERY_MARGIN * width, widest)
        width = max(width + 1, int(width * 1.4))
    return widest


def _best(scores: Vectors, count: int) -> tuple[Vectors, Positions]:
    """The greatest of each row and their places, greatest first."""
    if count < scores.shape[1]:
        places = np.argpartition(-scores, count - 1, axis=1)[:, :count] if count else (
            np.empty((len(scores), 0), np.int64)
        )  # fmt: skip
    else:
        places = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    best = np.take_along_axis(scores, places, axis=1)
    order = np.argsort(-best, axis=1, kind="stable")
    places, best = (
        np.take_along_axis(places, order, axis=1),
        np.take_along_axis(best, order, axis=1),
    )
    return best, np.where(np.isneginf(best), _NONE, places)


def _save(
    folder: Path, index: Any, numbers: Numbers, modalities: NDArray[np.uint8], info: IndexInfo
) -> None:
    """Writes an index beside its folder and renames it when it is on disk."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    faiss.write_index(index, str(unfinished / _INDEX))
    np.save(unfinished / "numbers.npy", numbers)
    np.save(unfinished / "modalities.npy", modalities)
    checksum = {file.name: _checksum(file) for file in sorted(unfinished.iterdir())}
    text = json.dumps({**asdict(info), "checksum": checksum})
    (unfinished / _INFO).write_text(text, "utf-8")
    for file in [*unfinished.iterdir(), unfinished]:
        _sync(file)
    unfinished.rename(folder)
    _sync(folder.parent)


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as content:
        while chunk := content.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
