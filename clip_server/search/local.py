"""The local engine: rows in SQLite, and an index of faiss derived from them.

A write is acknowledged once SQLite has it on disk. Rows that the index does not hold yet are
searched exactly, in memory, and merged into it in the background: the next index is written
beside the one in use, which is never changed, and takes its place when it is complete. So an index
that is missing, damaged or out of date costs time and no row.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import faiss
import numpy as np
from filelock import FileLock, Timeout

from clip_server.errors import ConfigurationError
from clip_server.search import segments
from clip_server.search.filters import Condition
from clip_server.search.fingerprint import Fingerprint
from clip_server.search.rows import MODALITIES, Numbers, RowTable
from clip_server.search.segments import AnnSegment, Batch, Mask, MemorySegment, Segment
from clip_server.search.store import (
    Description,
    Hit,
    IndexMethod,
    Modality,
    Query,
    Row,
    Settings,
    Target,
    Vectors,
)

log = logging.getLogger(__name__)

_ROWS, _LOCK, _INDEXES = "rows.sqlite", "lock", "index-*"
# Rows that are searched exactly beside an index before they are merged into it: so many, or this
# part of the index.
_MERGED_FROM, _MERGED_PART = 4096, 1 / 8
# An index is made anew when this part of it is gone, or it grew by so much since its clusters
# were formed.
_MOST_DEAD, _MOST_GROWTH = 0.2, 4
# `auto` goes back to exact search only far below the size at which it left it.
_SHRUNK = 0.5
_MOST_MASKS = 32
_RETRY_SECONDS = 60.0


class _ClosingError(Exception):
    """The collection is being closed."""


@dataclass(frozen=True)
class _Parts:
    """A consistent view for searches: the index, and the rows that it does not cover yet."""

    index: AnnSegment | None
    fresh: MemorySegment

    def segments(self) -> list[Segment]:
        return [each for each in (self.index, self.fresh) if each is not None]


class LocalStore:
    """A collection in a folder of this machine. See Store."""

    def __init__(self, settings: Settings, model: Fingerprint | None) -> None:
        folder = Path(settings.location)
        _finish_swap(folder)
        if model is None and not (folder / _ROWS).is_file():
            raise ConfigurationError(f"there is no collection in {folder}")
        self._folder, self._settings = folder, settings
        self._lock = _lock(folder)
        try:
            self._rows = RowTable(folder / _ROWS)
            self.model = _agree(folder, self._rows, model)
            self._parts = self._load()
        except BaseException:
            self._lock.release()
            raise
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._closing = False
        self._flush_through = 0
        self._failed: Exception | None = None
        self._merging = threading.Thread(target=self._merge_when_due, name="index", daemon=True)
        self._merging.start()

    @classmethod
    def open(cls, settings: Settings, model: Fingerprint | None) -> LocalStore:
        return cls(settings, model)

    @classmethod
    def shadow(cls, settings: Settings) -> Settings:
        location = f"{settings.location}.new"
        shutil.rmtree(location, ignore_errors=True)
        return replace(settings, location=location)

    @classmethod
    def swap(cls, settings: Settings, shadow: Settings) -> None:
        folder, new = Path(settings.location), Path(shadow.location)
        old = folder.with_name(f"{folder.name}.old")
        if folder.exists():
            lock = _lock(folder)
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
            lock.release()
        new.rename(folder)
        _finish_swap(folder)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._merging.join()
        self._rows.close()
        self._lock.release()

    def upsert(self, rows: Sequence[Row]) -> None:
        # Of several with one id, the last.
        rows = list({row.id: row for row in rows}.values())
        if not rows:
            return
        vectors = segments.prepare(np.stack([r.embedding for r in rows]), self._settings.metric)
        modalities = np.array([MODALITIES.index(row.modality) for row in rows], np.uint8)
        with self._writing:
            numbers, replaced = self._rows.upsert(rows)
            fresh = self._parts.fresh.with_rows(numbers, modalities, vectors)
            self._parts = _Parts(self._parts.index, fresh)
            self._forget(replaced)

    def delete(self, ids: Sequence[str]) -> int:
        with self._writing:
            return self._forget(self._rows.delete(ids))

    def delete_matching(self, condition: Condition) -> int:
        with self._writing:
            return self._forget(self._rows.delete_matching(condition))

    def _forget(self, numbers: Numbers) -> int:
        for segment in self._parts.segments():
            segment.remove(numbers)
        with self._changed:
            self._changed.notify_all()
        return len(numbers)

    def search(self, embeddings: Vectors, query: Query) -> list[list[Hit]]:
        faiss.omp_set_num_threads(1)  # of this thread; searches run beside each other
        queries = segments.prepare(embeddings, self._settings.metric)
        found: list[list[tuple[float, int]]] = [[] for _ in queries]
        for segment in self._parts.segments():
            allowed = self._allowed(segment, query)
            scores, positions = segment.search(queries, query.limit, allowed)
            for hits, row_scores, row_positions in zip(found, scores, positions, strict=True):
                good = row_positions >= 0
                numbers = segment.numbers[row_positions[good]]
                hits += zip(row_scores[good].tolist(), numbers.tolist(), strict=True)
        best = [sorted(hits, reverse=True)[: query.limit] for hits in found]
        rows = self._rows.get_numbered({number for hits in best for _, number in hits})
        return [
            [
                Hit(row_id, modality, score, text, uri, tags)
                for closeness, number in hits
                # A row may be deleted while it is searched for.
                for row_id, modality, text, uri, tags in ([rows[number]] if number in rows else [])
                if self._passes(score := self._score(closeness), query.threshold)
            ]
            for hits in best
        ]

    def _allowed(self, segment: Segment, query: Query) -> Mask | None:
        """The positions that a query may find; None: all."""
        allowed = segment.alive.copy()
        if query.target != "both":
            modality: Modality = "text" if query.target == "texts" else "image"
            allowed &= segment.modalities == MODALITIES.index(modality)
        if query.filter is not None:
            allowed &= self._mask(segment, query.filter)
        return None if allowed.all() else allowed

    def _mask(self, segment: Segment, condition: Condition) -> Mask:
        """The positions that fulfil a condition."""
        known = segment.masks if isinstance(segment, AnnSegment) else None
        if known is not None and (mask := known.get(condition)) is not None:
            return mask
        mask = np.zeros(len(segment.numbers), np.bool_)
        if len(mask):
            first = int(segment.numbers[0])
            numbers = self._rows.matching(condition, first - 1, segment.last)
            # Rows of the range that another segment holds are not among them.
            places = np.searchsorted(segment.numbers, numbers)
            mask[places[segment.numbers[places] == numbers]] = True
        if known is not None:
            known[condition] = mask
            while len(known) > _MOST_MASKS:
                known.popitem(last=False)
        return mask

    def _score(self, closeness: float) -> float:
        return max(-closeness, 0.0) ** 0.5 if self._settings.metric == "L2" else closeness

    def _passes(self, score: float, threshold: float | None) -> bool:
        if threshold is None:
            return True
        return score <= threshold if self._settings.metric == "L2" else score >= threshold

    def get(self, ids: Sequence[str]) -> list[Row | None]:
        found = self._rows.get(ids)
        return [found.get(each) for each in ids]

    def count(self, condition: Condition | None = None, target: Target = "both") -> int:
        if condition is not None:
            return self._rows.count(condition, target)
        # Every query's relevance asks for it: not by reading the table.
        asked = Query(target=target)
        return sum(_counted(each, self._allowed(each, asked)) for each in self._parts.segments())

    def scan(self, batch: int = 1000) -> Iterator[list[Row]]:
        return self._rows.scan(batch)

    def sample(self, modality: Modality, count: int) -> Vectors:
        return self._rows.sample(modality, count, self.model.dim)

    def describe(self) -> Description:
        index, fresh = self._parts.index, self._parts.fresh
        return Description(
            engine="local",
            rows=sum(int(np.count_nonzero(each.alive)) for each in self._parts.segments()),
            indexed=int(np.count_nonzero(index.alive)) if index else 0,
            dim=self.model.dim,
            model=self.model.name,
            metric=self._settings.metric,
            index_method=str(index.method if index else self._wanted(len(fresh.numbers))),
        )

    def flush(self) -> None:
        """Raises the error that keeps the index from being written."""
        with self._changed:
            self._flush_through = max(self._flush_through, self._parts.fresh.last)
            self._failed = None
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._failed or self._closing or not self._due(), timeout=None
            )
            if self._failed:
                raise self._failed

    def _load(self) -> _Parts:
        """The index on disk, if it fits, and the rows that it does not hold."""
        dim, metric = self.model.dim, self._settings.metric
        index = None
        for folder in sorted(self._folder.glob(_INDEXES), key=_generation, reverse=True):
            # faiss raises RuntimeError for whatever it cannot read.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RuntimeError):
                if index is None and not folder.suffix:
                    index = AnnSegment.load(folder)
                    if (index.info.metric, index.info.dim) == (metric, dim):
                        continue
                    index = None
            log.warning("the index %s is out of date or damaged: it is made anew", folder.name)
            shutil.rmtree(folder, ignore_errors=True)
        if index is not None:
            index.alive[:] = np.isin(index.numbers, self._rows.numbers(), assume_unique=True)
        fresh = MemorySegment.empty(dim, metric)
        for batch in self._read_vectors(index.last if index else 0):
            fresh = fresh.with_rows(*batch)
        return _Parts(index, fresh)

    def _read_vectors(self, after: int) -> Iterable[Batch]:
        for numbers, modalities, vectors in self._rows.vectors(after, self.model.dim):
            yield numbers, modalities, segments.prepare(vectors, self._settings.metric)

    def _wanted(self, rows: int) -> IndexMethod:
        """The method for so many rows."""
        wanted, index = self._settings.index_method, self._parts.index
        is_clustered = index is not None and index.method.kind == "IVF"
        if wanted.kind == "auto" and is_clustered and rows > _SHRUNK * segments.FLAT_ROWS:
            wanted = IndexMethod("IVF")
        return segments.resolve(wanted, rows)

    def _must_rebuild(self) -> bool:
        """Whether the index does not do any more, and is made anew instead of extended."""
        index, fresh = self._parts.index, self._parts.fresh
        if index is None:
            return True
        rows = len(index.numbers) + len(fresh.numbers)
        alive = int(np.count_nonzero(index.alive))
        wanted = self._wanted(alive + len(fresh.numbers))
        other = wanted.kind != index.method.kind or (
            wanted.kind == "HNSW" and wanted.size != index.method.size
        )
        formed_with = max(index.info.trained_rows, _MERGED_FROM)
        outgrown = index.method.kind == "IVF" and rows > _MOST_GROWTH * formed_with
        dead = len(index.numbers) - alive
        return other or outgrown or dead > max(_MOST_DEAD * len(index.numbers), _MERGED_FROM)

    def _due(self) -> bool:
        """Whether there is something to merge."""
        index, fresh = self._parts.index, self._parts.fresh
        indexed = len(index.numbers) if index else 0
        if len(fresh.numbers) and fresh.numbers[0] <= self._flush_through:
            return True
        if len(fresh.numbers) >= max(_MERGED_FROM, _MERGED_PART * indexed):
            return True
        return index is not None and self._must_rebuild()

    def _merge_when_due(self) -> None:
        """The thread that keeps the index up to date."""
        faiss.omp_set_num_threads(1)  # of this thread: searches need the others
        while True:
            with self._changed:
                wait = _RETRY_SECONDS if self._failed else None
                self._changed.wait_for(
                    lambda: self._closing or (not self._failed and self._due()), wait
                )
                if self._closing:
                    return
                self._failed = None
                if not self._due():
                    continue
            try:
                self._merge()
            except _ClosingError:
                return
            except Exception as error:
                log.warning("the index cannot be written, so all is searched exactly: %s", error)
                self._failed = error
            with self._changed:
                self._changed.notify_all()

    def _merge(self) -> None:
        base = None if self._must_rebuild() else self._parts.index
        after, through = base.last if base else 0, self._parts.fresh.last
        alive = sum(int(np.count_nonzero(each.alive)) for each in self._parts.segments())
        generation = max(map(_generation, self._folder.glob(_INDEXES)), default=0) + 1
        folder = self._folder / f"index-{generation}"
        segments.build(
            lambda: self._read_vectors(after),
            alive,
            wanted=self._wanted(alive),
            metric=self._settings.metric,
            dim=self.model.dim,
            base=base,
            folder=folder,
            check=self._check_open,
        )
        merged = AnnSegment.load(folder)
        with self._writing:
            existing = self._rows.numbers()
            merged.alive[:] = np.isin(merged.numbers, existing, assume_unique=True)
            # Rows up to `through` that are not in the index were deleted.
            fresh = self._parts.fresh.after(max(merged.last, through))
            old, self._parts = self._parts.index, _Parts(merged, fresh)
        if old is not None:
            shutil.rmtree(old.folder, ignore_errors=True)

    def _check_open(self) -> None:
        if self._closing:
            raise _ClosingError


def _lock(folder: Path) -> FileLock:
    """Makes a folder this process's own, for as long as the lock is held."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise ConfigurationError(
            f"the collection in {folder} is open in another process: send to its server, or stop "
            "it first"
        ) from None
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot hold a collection: {error.strerror}") from None
    return lock


def _counted(segment: Segment, allowed: Mask | None) -> int:
    return len(segment.numbers) if allowed is None else int(np.count_nonzero(allowed))


def _finish_swap(folder: Path) -> None:
    """Leaves one collection where an exchange of two was interrupted."""
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _agree(folder: Path, rows: RowTable, model: Fingerprint | None) -> Fingerprint:
    """The model of a collection, which is that of its first opening."""
    written = rows.setting("model")
    if written is None:
        if model is None:
            raise ConfigurationError(f"there is no collection in {folder}")
        rows.set("model", model.to_json())
        return model
    known = Fingerprint.from_json(written)
    if model is not None and (difference := known.difference(model)):
        raise ConfigurationError(
            f"the collection in {folder} is of another model: {difference}. Serve its model, name "
            "another folder, or encode it again: python -m clip_server.gallery reindex --help"
        )
    return known


def _generation(folder: Path) -> int:
    number = folder.stem.removeprefix("index-")
    return int(number) if number.isdecimal() else 0
