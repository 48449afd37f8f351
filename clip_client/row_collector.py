"""Collects what an indexer answers: ids of stored items, or the matches of queries."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from clip_client.callbacks import Batch, Callbacks, PlainDocument
from clip_client.collector import Advance, ResultCollector
from clip_client.documents import is_document, note_failure
from clip_client.errors import InvalidInputError
from clip_client.matches import set_matches
from clip_client.proto.clip_pb2 import Item


class RowCollector(ResultCollector):
    """Takes the batches in order, and keeps their results unless `on_done` takes them."""

    def __init__(self, callbacks: Callbacks, advance: Advance) -> None:
        super().__init__(callbacks, advance=advance)
        self.results: list[Any] = []

    def keep(self, batch: Batch) -> None:
        """Adds the next batch."""
        self.total += len(batch.indices)
        self.failures.extend(batch.errors)
        results = batch.results or [None] * len(batch.indices)
        if self.keeps:
            self.results.extend(results)
        failed = {failure.index: failure.message for failure in batch.errors}
        for index, result, embedding in zip(batch.indices, results, batch.embeddings, strict=True):
            document = self._documents.get(index)
            if document is None:
                continue
            if batch.exception is None:
                note_failure(document, failed.get(index))
            if embedding.size and index not in failed:
                document.embedding = embedding.copy()
            if isinstance(result, list):
                set_matches(document, result)
            if not self.keeps or isinstance(document, PlainDocument):
                del self._documents[index]


class IndexCollector(RowCollector):
    """Adds to each item its id, its tags, and where it came from, before it is sent.

    ids, tags: one for each item, in place of those that the items have themselves.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        advance: Advance,
        ids: Iterable[Any] | None,
        tags: Iterable[Mapping[str, Any]] | None,
    ) -> None:
        super().__init__(callbacks, advance)
        self._ids = None if ids is None else iter(ids)
        self._tags = None if tags is None else iter(tags)
        # Of items that are read and not yet sent.
        self._details: dict[int, Item] = {}

    def begin(self, index: int, raw_item: Any) -> None:
        """Registers an item before it is read."""
        super().begin(index, raw_item)
        given_id = _field(raw_item, "id") if self._ids is None else next(self._ids, None)
        tags = _field(raw_item, "tags") if self._tags is None else next(self._tags, None)
        details = Item(source=_source(raw_item))
        try:
            details.id = "" if given_id is None else str(given_id)
            details.tags.update(dict(tags or {}))
        except (TypeError, ValueError, AttributeError):
            raise InvalidInputError(
                f"tags are a dict of texts, numbers, bools, lists and dicts, not {tags!r:.60}"
            ) from None
        self._details[index] = details

    def read(self, index: int, item: Item) -> None:
        """Registers the content of an item, and adds the details to it."""
        super().read(index, item)
        item.MergeFrom(self._details.pop(index, Item()))


def _field(raw_item: Any, name: str) -> Any:
    if isinstance(raw_item, Mapping):
        return raw_item.get(name)
    return getattr(raw_item, name, None) if is_document(raw_item) else None


def _source(raw_item: Any) -> str:
    """The path or the URL of an image."""
    if is_document(raw_item):
        uri = getattr(raw_item, "uri", None) or getattr(raw_item, "url", None)
    elif isinstance(raw_item, (str, os.PathLike)):
        uri = raw_item
    else:
        uri = PlainDocument.of(raw_item).uri
    return os.fsdecode(uri) if isinstance(uri, (str, os.PathLike)) else ""
