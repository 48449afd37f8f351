"""What becomes of the batches of one call: Documents, callbacks, the progress bar, the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import content
from clip_client.errors import ItemFailure
from clip_client.results import Batch

Callback = Callable[[Batch], Any]
Advance = Callable[[int], None]


# New memory is given in large pieces at a fraction of what it costs in those of a batch.
_BLOCK_BYTES = 16 * 2**20


class Rows:
    """Embeddings, one batch after the other."""

    def __init__(self) -> None:
        self._blocks: list[NDArray[np.float32]] = []
        self._room = self._total = 0  # rows that the last block has left, and rows of all

    @property
    def dim(self) -> int:
        """D, or 0 while no embedding has come."""
        return max((block.shape[1] for block in self._blocks), default=0)

    def add(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Takes [n, D], or [n, 0] where D is not known, and gives them where they are kept."""
        count, dim = rows.shape
        if count > self._room or dim != self._blocks[-1].shape[1]:
            self._cut()
            # As many as there are already, so that a few take no more than they need.
            self._room = max(count, min(self._total, _BLOCK_BYTES // (4 * dim or 1)))
            self._blocks.append(np.empty((self._room, dim), np.float32))
        first = len(self._blocks[-1]) - self._room
        kept = self._blocks[-1][first : first + count]
        kept[:] = rows
        self._room -= count
        self._total += count
        return kept

    def array(self, dim: int) -> NDArray[np.float32]:
        """All of them, [N, D], with NaN where D was not known."""
        self._cut()
        filled = [
            block if block.shape[1] else np.full((len(block), dim), np.nan, np.float32)
            for block in self._blocks
        ]
        return np.concatenate([np.empty((0, dim), np.float32), *filled])

    def _cut(self) -> None:
        """Takes what is left of the last block off it."""
        if self._room:
            self._blocks[-1] = self._blocks[-1][: -self._room]
            self._room = 0


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
        if self._into_documents and content.is_document(thing):
            self._documents[index] = thing

    def add(self, batch: Batch) -> None:
        self.total += len(batch.indices)
        self.failures.extend(batch.errors)
        rows = batch.embeddings
        # Callbacks may write to what they get, and not to a message.
        batch = replace(batch, embeddings=self._rows.add(rows) if self.keeps else rows.copy())
        self._embed_documents(batch)
        if self._on_done and batch.exception is None:
            self._on_done(batch)
        if self._on_error and (batch.exception or batch.errors):
            self._on_error(batch)
        if self._on_always:
            self._on_always(batch)
        self._advance(len(batch.indices))

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
        return self._rows.array(dim)

    def _embed_documents(self, batch: Batch) -> None:
        failed = {failure.index for failure in batch.errors}
        for row, index in enumerate(batch.indices if self._documents else ()):
            if index in self._documents and index not in failed and batch.exception is None:
                self._documents[index].embedding = batch.embeddings[row].copy()
            if not self.keeps:
                self._documents.pop(index, None)


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
        parts.TimeRemainingColumn(),
    )
    # A console of its own: one console draws one bar, and threads may each have theirs.
    with parts.Progress(*columns, console=Console(stderr=True)) as bar:
        total = len(items) if hasattr(items, "__len__") else None
        task = bar.add_task("", total=total, rate="")

        def advance(count: int) -> None:
            bar.advance(task, count)
            speed = bar.tasks[0].speed or 0
            bar.update(task, rate=f"{speed:.0f} items/s")

        yield advance
