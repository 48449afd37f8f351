"""Encodes a stream of items: reads ahead, batches, sends, and collects the answers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from clip_client import inputs
from clip_client.callbacks import Batch
from clip_client.documents import is_document
from clip_client.envelope import MESSAGE_BYTES
from clip_client.errors import InvalidInputError, ItemFailure, ServerError
from clip_client.labels import brief, label
from clip_client.matches import ids_in, matches_in
from clip_client.proto import clip_pb2
from clip_client.sansio import CallGenerator

# The most images that are being read, or read and not yet sent.
READ_AHEAD = 16
# Items per request by default.
TEXTS, IMAGES = 128, 32

Send = Callable[[clip_pb2.Request], Future[clip_pb2.Response]]
Inputs = Iterator[Any] | AsyncIterator[Any]
Reading = clip_pb2.Item | ItemFailure | Future[clip_pb2.Item]
# The field of each request that holds its items.
_ITEMS = {"encode": "items", "index": "items", "search": "queries"}
_END = object()


class Collector(Protocol):
    """Takes the batches of a call, in order."""

    def begin(self, index: int, raw_item: Any) -> None:
        """Registers an item before it is read."""

    def read(self, index: int, item: clip_pb2.Item) -> None:
        """Registers the content of an item before it is sent, and may add to it."""

    def add(self, batch: Batch, truncated: int = 0) -> None:
        """Adds a batch. truncated: its texts that were longer than the model reads."""

    def fail(self, batch: Batch) -> bool:
        """Adds a request that failed as a whole; returns whether the call may go on."""

    def keep(self, batch: Batch) -> None:
        """Adds a batch after the call has failed."""


class RequestBatch:
    """The items of one request, and those among them that could not be read."""

    def __init__(self, batch_size: int | None, template: clip_pb2.Request) -> None:
        self.indices: list[int] = []
        self._names: list[Any] = []
        self.failures: list[ItemFailure] = []
        # Filled in place: adding a message to another copies it.
        self._request = clip_pb2.Request()
        self._request.CopyFrom(template)
        self._kind = template.WhichOneof("body") or ""
        self._items = getattr(getattr(self._request, self._kind), _ITEMS[self._kind])
        self._batch_size = batch_size
        self._limit = batch_size or IMAGES
        self._rows: list[int] = []
        self._bytes = 0

    def add(self, index: int, item: clip_pb2.Item | ItemFailure, name: Any) -> bool:
        """Adds an item if there is room, and returns whether there was; the first always fits.

        name: passed to `label` to name the item if it fails.
        """
        if len(self.indices) >= self._limit:
            return False
        if isinstance(item, ItemFailure):
            self.failures.append(item)
        else:
            size = item.ByteSize()
            if self.indices and self._bytes + size > MESSAGE_BYTES:
                return False
            if not self._rows:
                self._limit = self._batch_size or (TEXTS if item.HasField("text") else IMAGES)
            self._rows.append(len(self.indices))
            self._items.append(item)
            self._bytes += size
        self.indices.append(index)
        self._names.append(name)
        return True

    def take_request(self) -> clip_pb2.Request | None:
        """Returns the request and releases it; None if there is nothing to send."""
        request, self._request = self._request, clip_pb2.Request()
        self._items = None
        return request if self._rows else None

    def failed(self, error: Exception) -> Batch:
        """The batch for a request that failed as a whole."""
        empty = np.empty((len(self.indices), 0), np.float32)
        return Batch(self.indices, empty, self.failures, error)

    def batch(self, response: clip_pb2.Response | None) -> Batch:
        """The batch for an answer, each row at the place of its item."""
        empty = np.empty((len(self.indices), 0), np.float32)
        if response is None:
            return Batch(self.indices, empty, self.failures)
        answer = getattr(response, self._kind)
        failures = [self._failure(error) for error in answer.errors]
        ordered = sorted(self.failures + failures, key=lambda failure: failure.index)
        if self._kind == "encode":
            return Batch(self.indices, self._placed(_matrix(answer, len(self._rows))), ordered)
        embeddings = empty
        if self._kind == "index" and answer.embeddings:
            embeddings = self._placed(_indexed(answer, len(self._rows)))
        return Batch(self.indices, embeddings, ordered, results=self._results(answer))

    def _placed(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The rows of an answer at the places of their items, and NaN for the others."""
        if len(self._rows) == len(self.indices):
            return rows
        embeddings = np.full((len(self.indices), rows.shape[1]), np.nan, np.float32)
        embeddings[self._rows] = rows
        return embeddings

    def _results(self, answer: Any) -> list[Any]:
        """An indexer's results by item; None for those that failed."""
        found = ids_in(answer) if self._kind == "index" else matches_in(answer)
        if len(found) != len(self._rows):
            raise ServerError(f"the answer to {len(self._rows)} items holds {len(found)} results")
        results: list[Any] = [None] * len(self.indices)
        for row, result in zip(self._rows, found, strict=True):
            results[row] = result
        return results

    def truncated(self, response: clip_pb2.Response | None) -> int:
        """The number of its texts that were longer than the model reads."""
        return int(getattr(response, self._kind).truncated) if response else 0

    def _failure(self, error: clip_pb2.ItemError) -> ItemFailure:
        count = len(self._rows)
        if error.index >= count:
            raise ServerError(f"the answer to {count} items holds an error of item {error.index}")
        row = self._rows[error.index]
        return ItemFailure(self.indices[row], error.message, label(self._names[row]))


class Encoding:
    """Reads, batches and sends the items of one call; `collector` gets each batch, in order.

    Memory is bounded: at most `READ_AHEAD` items and `prefetch` requests are held.

    template: a request without items.
    first: what the collector needs before it gets a batch.
    """

    def __init__(
        self,
        send: Send,
        read: Callable[[inputs.Read], Future[clip_pb2.Item]],
        collector: Collector,
        *,
        batch_size: int | None,
        prefetch: int,
        template: clip_pb2.Request,
        first: Future[Any] | None = None,
    ) -> None:
        self._send = send
        self._read = read
        self._collector = collector
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._template = template
        self._first = first
        self._reading: deque[tuple[int, Reading, Any]] = deque()
        self._filling = RequestBatch(batch_size, template)
        self._in_flight: deque[tuple[RequestBatch, Future[clip_pb2.Response] | None]] = deque()
        self._file_names = inputs.FileNames()

    def run(self, raw_items: Inputs) -> CallGenerator[None]:
        """Encodes all of `raw_items`; if it raises, the answers received so far are kept."""
        index = 0
        try:
            while (raw_item := (yield from _pull(raw_items))) is not _END:
                name = brief(raw_item)
                if not self._is_added(index, reading := self._begin(index, raw_item), name):
                    self._reading.append((index, reading, name))
                    yield from self._advance(READ_AHEAD)
                if self._in_flight and _is_done(self._in_flight[0][1]):
                    yield from self._collect(self._prefetch)
                index += 1
            yield from self._advance(0)
            yield from self._dispatch()
            yield from self._collect(0)
            self._file_names.warn()
        except Exception:
            self._salvage()
            raise
        finally:
            self._cancel()

    def _begin(self, index: int, raw_item: Any) -> Reading:
        try:
            self._collector.begin(index, raw_item)
            begun = inputs.to_item(raw_item)
        # Any exception, even from an item's own class, fails that item alone.
        except Exception as error:
            return _failure(index, error, raw_item)
        if not isinstance(begun, clip_pb2.Item):
            return self._read(begun)
        if begun.HasField("text"):
            self._file_names.check(raw_item)
        return begun

    def _is_added(self, index: int, reading: Reading, name: Any) -> bool:
        """Adds an item if it is next, read, and fits, as nearly every text; returns whether."""
        if self._reading or isinstance(reading, Future):
            return False
        return self._put(index, reading, name)

    def _advance(self, limit: int) -> CallGenerator[None]:
        """Adds the items that are read, and waits until at most `limit` are unread."""
        while self._reading and (len(self._reading) > limit or _is_ready(self._reading[0][1])):
            index, reading, name = self._reading.popleft()
            item = yield from _settled(index, reading, name)
            if not self._put(index, item, name):
                yield from self._dispatch()
                self._put(index, item, name)

    def _put(self, index: int, item: clip_pb2.Item | ItemFailure, name: Any) -> bool:
        """Adds an item to the filling request, if there is room; returns whether."""
        if isinstance(item, clip_pb2.Item):
            self._collector.read(index, item)
        return self._filling.add(index, item, name)

    def _dispatch(self) -> CallGenerator[None]:
        """Sends the filling request as soon as fewer than `prefetch` are in flight."""
        if not self._filling.indices:
            return
        yield from self._collect(self._prefetch - 1)
        request = self._filling.take_request()
        self._in_flight.append((self._filling, self._send(request) if request else None))
        self._filling = RequestBatch(self._batch_size, self._template)

    def _collect(self, limit: int) -> CallGenerator[None]:
        """Collects the answers that have arrived, and waits until at most `limit` are in flight."""
        while self._in_flight and (len(self._in_flight) > limit or _is_done(self._in_flight[0][1])):
            request_batch, answer = self._in_flight.popleft()
            try:
                response = (yield answer) if answer else None
                batch = request_batch.batch(response)
                if self._first is not None:
                    yield self._first
            except Exception as error:
                if not self._collector.fail(request_batch.failed(error)):
                    raise
            else:
                self._collector.add(batch, request_batch.truncated(response))

    def _salvage(self) -> None:
        """Keeps answers that arrived out of order when the call ends with an error."""
        for request_batch, answer in self._in_flight:
            try:
                response = answer.result(0) if answer else None
                batch = request_batch.batch(response)
            except Exception as error:
                batch = request_batch.failed(error)
            self._collector.keep(batch)

    def _cancel(self) -> None:
        for _, reading, _ in self._reading:
            if isinstance(reading, Future):
                reading.cancel()
        for _, answer in self._in_flight:
            if answer:
                answer.cancel()


def iterate(raw_items: Any, name: str = "encode") -> Inputs:
    """Iterates over the items. Raises TypeError for a single item."""
    single = isinstance(raw_items, (str, bytes, bytearray, memoryview, dict))
    single = single or (hasattr(raw_items, "__array__") and _dimensions(raw_items) in (2, 3))
    single = single or (is_document(raw_items) and not hasattr(raw_items, "__getitem__"))
    if not single:
        if hasattr(raw_items, "__aiter__"):
            stream: AsyncIterator[Any] = raw_items.__aiter__()
            return stream
        if isinstance(raw_items, Iterable):
            return iter(raw_items)
    shown = repr(raw_items)
    shown = shown if len(shown) <= 40 else "item"
    raise TypeError(f"pass several items, not one {type(raw_items).__name__}: {name}([{shown}])")


def _dimensions(array: Any) -> int:
    return len(getattr(array, "shape", ()))


def _pull(raw_items: Inputs) -> CallGenerator[Any]:
    if isinstance(raw_items, Iterator):
        return next(raw_items, _END)
    try:
        return (yield raw_items.__anext__())
    except StopAsyncIteration:
        return _END


def _settled(index: int, reading: Reading, name: Any) -> CallGenerator[clip_pb2.Item | ItemFailure]:
    if not isinstance(reading, Future):
        return reading
    try:
        item: clip_pb2.Item = yield reading
        return item
    except Exception as error:
        return _failure(index, error, name)


def _failure(index: int, error: Exception, name: Any) -> ItemFailure:
    if isinstance(error, InvalidInputError):
        return ItemFailure(index, str(error), label(name))
    return ItemFailure(index, f"{type(error).__name__}: {error}", label(name))


def _is_ready(reading: Reading) -> bool:
    return not isinstance(reading, Future) or reading.done()


def _is_done(answer: Future[clip_pb2.Response] | None) -> bool:
    return answer is None or answer.done()


def _matrix(response: clip_pb2.EncodeResponse, rows: int) -> NDArray[np.float32]:
    embeddings = response.embeddings  # every access makes a copy
    if response.count != rows or len(embeddings) != rows * response.dim * 4:
        raise ServerError(
            f"the answer to {rows} items holds {response.count} x {response.dim} embeddings "
            f"in {len(embeddings)} bytes"
        )
    matrix: NDArray[np.float32] = np.frombuffer(embeddings, "<f4")
    return matrix.reshape(rows, response.dim)


def _indexed(response: clip_pb2.IndexResponse, rows: int) -> NDArray[np.float32]:
    embeddings = response.embeddings
    if len(embeddings) % (4 * rows):
        raise ServerError(f"the answer to {rows} items holds {len(embeddings)} bytes of embeddings")
    return np.frombuffer(embeddings, "<f4").reshape(rows, -1)
