"""What becomes of the batches of one call: Documents, callbacks, the progress bar, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import inputs
from clip_client.errors import ItemFailure
from clip_client.results import Batch

Callback = Callable[[Batch], Any]
Advance = Callable[[int], None]


# Room is made for so much at a time, or for an eighth of what there is: some systems copy it.
_ROOM_BYTES = 16 * 2**20


class Rows:
    """Embeddings, one batch after the other, in one array that grows where it lies.

    Batches put together in the end would take the memory twice, and new memory is most of what
    it costs to receive an embedding: the system has to clear it.
    """

    def __init__(self) -> None:
        self._array = np.empty((0, 0), np.float32)
        self._count = 0

    @property
    def dim(self) -> int:
        """D, or 0 while no embedding has come."""
        return self._array.shape[1]

    def add(self, rows: NDArray[np.float32]) -> None:
        """Takes [n, D], or [n, 0] where D is not known, which become NaN."""
        total = self._count + len(rows)
        if dim := self.dim or rows.shape[1]:
            self._make_room(total, dim)
            self._array[self._count : total] = rows if rows.shape[1] else np.nan
        self._count = total

    def take(self, dim: int, count: int = 0) -> NDArray[np.float32]:
        """All of them, [N, D], which are let go; NaN in rows to make them at least `count`."""
        self.add(np.empty((max(count - self._count, 0), 0), np.float32))
        self._make_room(self._count, dim)
        array, self._array = self._array, np.empty((0, 0), np.float32)
        array.resize(self._count, dim, refcheck=False)
        return array

    def _make_room(self, total: int, dim: int) -> None:
        if not self.dim:
            self._array = np.full((self._count, dim), np.nan, np.float32)
        room = len(self._array)
        if room < total:
            # At most as many as there are already, so that a few take no more than they need.
            more = max(min(room, _ROOM_BYTES // (4 * dim)), room // 8)
            # No one else has seen it. Linux moves a large one by its pages, without a copy.
            self._array.resize(max(total, room + more), dim, refcheck=False)


class Gathered:
    """Takes the batches in order, and holds the embeddings unless `on_done` took them."""

    def __init__(
        self,
        on_done: Callback | None = None,
        on_error: Callback | None = None,
        on_always: Callback | None = None,
        advance: Advance = lambda _: None,
        into_documents: bool = True,
    ) -> None:
        self.failures: list[ItemFailure] = []
        self.total = 0
        # Texts that were cut at the model's context length.
        self.truncated = 0
        self.keeps = on_done is None
        self._on_done = on_done
        self._on_error = on_error
        self._on_always = on_always
        self._advance = advance
        self._into_documents = into_documents
        self._rows = Rows()
        self._documents: dict[int, Any] = {}

    def begin(self, index: int, thing: Any) -> None:
        """Notes an item before it is read."""
        if self._into_documents and inputs.is_document(thing):
            self._documents[index] = thing

    def add(self, batch: Batch, truncated: int = 0) -> None:
        """Takes the next batch, and calls back."""
        self.truncated += truncated
        self.keep(batch)
        self._call_back(batch)
        self._advance(len(batch.indices))

    def keep(self, batch: Batch) -> None:
        """Takes the next batch."""
        self.total += len(batch.indices)
        self.failures.extend(batch.errors)
        if self.keeps:
            self._rows.add(batch.embeddings)
        self._embed_documents(batch)

    @property
    def dim(self) -> int:
        """D, or 0 while no embedding has come."""
        return self._rows.dim

    @property
    def documents(self) -> Sequence[Any] | None:
        """The items, where every one was a Document."""
        return list(self._documents.values()) if 0 < self.total == len(self._documents) else None

    def embeddings(self, dim: int) -> NDArray[np.float32]:
        """[N, D] float32."""
        return self._rows.take(dim)

    def computed(self, items: Any) -> NDArray[np.float32]:
        """[N, D] float32, NaN in the rows of items that are not computed; D is 0 if none is."""
        return self._rows.take(self._rows.dim, len(items) if hasattr(items, "__len__") else 0)

    def _call_back(self, batch: Batch) -> None:
        if self._on_done and (done := _embedded(batch)) is not None:
            self._on_done(done)
        called = [self._on_error if batch.exception or batch.errors else None, self._on_always]
        if any(called):  # they may write to what they get, and not to a message
            batch = replace(batch, embeddings=batch.embeddings.copy())
        for callback in filter(None, called):
            callback(batch)

    def _embed_documents(self, batch: Batch) -> None:
        failed = {failure.index: failure.message for failure in batch.errors}
        for row, index in enumerate(batch.indices if self._documents else ()):
            if index in self._documents and index not in failed and batch.exception is None:
                self._documents[index].embedding = batch.embeddings[row].copy()
            if index in self._documents and batch.exception is None:
                _note_failure(self._documents[index], failed.get(index))
            if not self.keeps:
                self._documents.pop(index, None)


def _note_failure(document: Any, message: str | None) -> None:
    """Writes into a Document why it has no embedding, where it has room: `.error` or `.tags`."""
    if hasattr(document, "error"):
        document.error = message
    elif isinstance(tags := getattr(document, "tags", None), MutableMapping):
        if message is None:
            tags.pop("clip_error", None)
        else:
            tags["clip_error"] = message


def _embedded(batch: Batch) -> Batch | None:
    """The items of a batch that have an embedding, in a copy; None where there are none."""
    failed = {failure.index for failure in batch.errors}
    rows = [row for row, index in enumerate(batch.indices) if index not in failed]
    if batch.exception is not None or not rows:
        return None
    indices = [batch.indices[row] for row in rows]
    return replace(batch, indices=indices, embeddings=batch.embeddings[rows])


@contextmanager
def progress(shown: bool, items: Any) -> Iterator[Advance]:
    """A bar on stderr that counts items, where it is asked for."""
    if not shown:
        yield lambda _: None
        return
    from rich import progress as parts
    from rich.console import Console

    columns = (
        parts.TextColumn("encoding"),
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TextColumn("{task.fields[rate]}"),
        parts.TimeElapsedColumn(),
        parts.TextColumn("elapsed,"),
        parts.TimeRemainingColumn(),
        parts.TextColumn("left"),
    )
    # A console of its own: one console draws one bar, and threads may each have theirs.
    with parts.Progress(*columns, console=Console(stderr=True)) as bar:
        total = len(items) if hasattr(items, "__len__") else None
        task = bar.add_task("", total=total, rate="")
        started = time.monotonic()

        def advance(count: int) -> None:
            bar.advance(task, count)
            rate = bar.tasks[0].completed / max(time.monotonic() - started, 1e-3)
            bar.update(task, rate=f"{rate:,.{0 if rate >= 10 else 2}f} items/s,")

        yield advance
