"""Collects batch results: Documents, callbacks, the progress bar, the output array."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.callbacks import Batch, Callbacks, PlainDocument, document_list, is_of_request
from clip_client.documents import is_document, note_failure
from clip_client.errors import ItemFailure
from clip_client.parameters import Parameters
from clip_client.proto.clip_pb2 import Item

Advance = Callable[[int], None]


# The buffer grows by this, or by an eighth of its size: some systems copy it to grow it.
_ROOM_BYTES = 16 * 2**20


class EmbeddingBuffer:
    """Appends batches of embeddings to one array that grows in place.

    Concatenating the batches at the end would need the memory twice, and new memory is most of
    the cost of receiving an embedding, since the system has to clear it.
    """

    def __init__(self) -> None:
        self._array = np.empty((0, 0), np.float32)
        self._count = 0

    @property
    def dim(self) -> int:
        """D, or 0 while no embedding has come."""
        return self._array.shape[1]

    def add(self, rows: NDArray[np.float32]) -> None:
        """Appends [n, D]; rows of [n, 0], where D is not known, become NaN."""
        total = self._count + len(rows)
        if dim := self.dim or rows.shape[1]:
            self._make_room(total, dim)
            self._array[self._count : total] = rows if rows.shape[1] else np.nan
        self._count = total

    def take(self, dim: int, count: int = 0) -> NDArray[np.float32]:
        """Empties the buffer and returns its rows, [N, D], with NaN rows up to at least `count`."""
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
            # At most doubled, so that a small result does not reserve much more than it needs.
            more = max(min(room, _ROOM_BYTES // (4 * dim)), room // 8)
            # No other reference exists. Linux remaps the pages of a large one without a copy.
            self._array.resize(max(total, room + more), dim, refcheck=False)


class ResultCollector:
    """Takes the batches in order, and keeps their embeddings unless `on_done` takes them."""

    def __init__(
        self,
        callbacks: Callbacks | None = None,
        parameters: Parameters | None = None,
        advance: Advance = lambda _: None,
        into_documents: bool = True,
    ) -> None:
        self.callbacks = callbacks or Callbacks()
        self._parameters = parameters or Parameters()
        self.failures: list[ItemFailure] = []
        self.total = 0
        # Texts that were truncated to the model's context length.
        self.truncated = 0
        self.keeps = self.callbacks.on_done is None
        # Whether `on_error` took the error of a request.
        self.handled = False
        self._advance = advance
        self._into_documents = into_documents
        self._rows = EmbeddingBuffer()
        # By their place in the input: those passed, and for callbacks one for each other item.
        self._documents: dict[int, Any] = {}

    def begin(self, index: int, raw_item: Any) -> None:
        """Registers an item before it is read."""
        if self._into_documents and is_document(raw_item):
            self._documents[index] = raw_item
        elif self.callbacks:
            self._documents[index] = PlainDocument.of(raw_item)

    def read(self, index: int, item: Item) -> None:
        """Registers the content of an item."""
        document = self._documents.get(index)
        if isinstance(document, PlainDocument):
            document.fill(item, not self._parameters.drop_image_content)

    def add(self, batch: Batch, truncated: int = 0) -> None:
        """Adds the next batch, and calls back."""
        self.truncated += truncated
        if self.callbacks:
            documents = document_list([self._documents[index] for index in batch.indices])
            batch = replace(batch, docs=documents, parameters=self._parameters.given)
        self.keep(batch)
        self.callbacks.call(batch, batch.succeeded() if self.callbacks.on_done else None)
        self._advance(len(batch.indices))

    def fail(self, batch: Batch) -> bool:
        """Adds a request that failed as a whole; returns whether `on_error` handles its error."""
        if not is_of_request(batch.exception):
            self.keep(batch)
            return False
        self.add(batch)
        self.handled = self.callbacks.on_error is not None
        return self.handled

    def keep(self, batch: Batch) -> None:
        """Adds the next batch."""
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
    def documents(self) -> list[Any] | None:
        """The items, if every one was a Document; else None."""
        return list(self._documents.values()) if 0 < self.total == len(self._documents) else None

    def embeddings(self, dim: int) -> NDArray[np.float32]:
        """[N, D] float32."""
        return self._rows.take(dim)

    def computed(self, items: Any) -> NDArray[np.float32]:
        """[N, D] float32, NaN in the rows of items that are not computed; D is 0 if none is."""
        return self._rows.take(self._rows.dim, len(items) if hasattr(items, "__len__") else 0)

    def _embed_documents(self, batch: Batch) -> None:
        failed = {failure.index: failure.message for failure in batch.errors}
        for row, index in enumerate(batch.indices if self._documents else ()):
            if (document := self._documents.get(index)) is None:
                continue
            if batch.exception is None:
                if index not in failed:
                    document.embedding = batch.embeddings[row].copy()
                note_failure(document, failed.get(index))
            if not self.keeps or isinstance(document, PlainDocument):
                del self._documents[index]


@contextmanager
def progress(shown: bool, items: Any, doing: str = "encoding") -> Iterator[Advance]:
    """Shows a progress bar on stderr that counts items, if `shown`."""
    if not shown:
        yield lambda _: None
        return
    from rich import progress as parts
    from rich.console import Console

    columns = (
        parts.TextColumn(doing),
        parts.BarColumn(),
        parts.MofNCompleteColumn(),
        parts.TextColumn("{task.fields[rate]}"),
        parts.TimeElapsedColumn(),
        parts.TextColumn("elapsed,"),
        parts.TimeRemainingColumn(),
        parts.TextColumn("left"),
    )
    # A console draws one bar at a time, and each thread may have a bar. What is printed meanwhile
    # goes above the bar, but only if it goes to a terminal: not if stdout is a file.
    console = Console(stderr=True)
    with parts.Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as bar:
        total = len(items) if hasattr(items, "__len__") else None
        task = bar.add_task("", total=total, rate="")
        started = time.monotonic()

        def advance(count: int) -> None:
            bar.advance(task, count)
            rate = bar.tasks[0].completed / max(time.monotonic() - started, 1e-3)
            bar.update(task, rate=f"{rate:,.{0 if rate >= 10 else 2}f} items/s,")

        yield advance
