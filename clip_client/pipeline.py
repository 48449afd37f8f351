"""One call of encode: items are read ahead, packed into requests, sent and gathered in order."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client import inputs
from clip_client.collector import Gathered
from clip_client.envelope import MESSAGE_BYTES
from clip_client.errors import InvalidInputError, ItemFailure, ServerError
from clip_client.labels import brief, label
from clip_client.proto import clip_pb2
from clip_client.results import Batch
from clip_client.steps import Flow

# Pictures being read at once, and read but not yet sent.
READ_AHEAD = 16
# Items of one request, where the caller does not say.
TEXTS, PICTURES = 128, 32

Send = Callable[[clip_pb2.Request], Future[clip_pb2.Response]]
Things = Iterator[Any] | AsyncIterator[Any]
Reading = clip_pb2.Item | ItemFailure | Future[clip_pb2.Item]
_END = object()


class Pack:
    """The items of one request, and those next to them that could not be read."""

    def __init__(self, batch_size: int | None, options: clip_pb2.Options) -> None:
        self.indices: list[int] = []
        self._names: list[Any] = []
        self.failures: list[ItemFailure] = []
        # Made where it is sent from: to put a message into another one copies it.
        self._request = clip_pb2.Request()
        self._request.encode.options.CopyFrom(options)
        self._batch_size = batch_size
        self._limit = batch_size or PICTURES
        self._rows: list[int] = []
        self._bytes = 0

    def add(self, index: int, item: clip_pb2.Item | ItemFailure, name: Any) -> bool:
        """Takes an item if there is room; whether there was. An empty pack takes any.

        name: what `label` makes the item's name of, where it fails.
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
                self._limit = self._batch_size or (TEXTS if item.HasField("text") else PICTURES)
            self._rows.append(len(self.indices))
            self._request.encode.items.append(item)
            self._bytes += size
        self.indices.append(index)
        self._names.append(name)
        return True

    def take_request(self) -> clip_pb2.Request | None:
        """The request, which is let go, or None where there is nothing to send."""
        request, self._request = self._request, clip_pb2.Request()
        return request if self._rows else None

    def failed(self, error: Exception) -> Batch:
        """The batch of a request that was not answered."""
        empty = np.empty((len(self.indices), 0), np.float32)
        return Batch(self.indices, empty, self.failures, error)

    def batch(self, response: clip_pb2.EncodeResponse | None) -> Batch:
        """The answer, each row at its item's place."""
        if response is None:
            empty = np.empty((len(self.indices), 0), np.float32)
            return Batch(self.indices, empty, self.failures)
        rows = _matrix(response, len(self._rows))
        if len(self._rows) == len(self.indices):
            embeddings = rows
        else:
            embeddings = np.full((len(self.indices), response.dim), np.nan, np.float32)
            embeddings[self._rows] = rows
        failures = [self._failure(error) for error in response.errors]
        ordered = sorted(self.failures + failures, key=lambda failure: failure.index)
        return Batch(self.indices, embeddings, ordered)

    def _failure(self, error: clip_pb2.ItemError) -> ItemFailure:
        row = self._rows[error.index]
        return ItemFailure(self.indices[row], error.message, label(self._names[row]))


class Encoding:
    """The reading, packing and sending of one call; `gathered` gets each batch, in order.

    What is held at once is bounded: `READ_AHEAD` items, and `prefetch` requests.
    """

    def __init__(
        self,
        send: Send,
        read: Callable[[inputs.Read], Future[clip_pb2.Item]],
        gathered: Gathered,
        *,
        batch_size: int | None,
        prefetch: int,
        options: clip_pb2.Options,
    ) -> None:
        self._send = send
        self._read = read
        self._gathered = gathered
        self._batch_size = batch_size
        self._prefetch = prefetch
        self._options = options
        self._reading: deque[tuple[int, Reading, Any]] = deque()
        self._pack = Pack(batch_size, options)
        self._in_flight: deque[tuple[Pack, Future[clip_pb2.Response] | None]] = deque()
        self._file_names = inputs.FileNames()

    def run(self, things: Things) -> Flow[None]:
        """Encodes all of `things`. What was answered when it ends with an error is kept."""
        index = 0
        try:
            while (thing := (yield from _pull(things))) is not _END:
                self._gathered.begin(index, thing)
                name = brief(thing)
                if not self._is_packed(index, reading := self._begin(index, thing), name):
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

    def _begin(self, index: int, thing: Any) -> Reading:
        try:
            begun = inputs.prepare(thing)
        # Whatever is wrong with one item, even in the code of its own class, is its own error.
        except Exception as error:
            return _failure(index, error, thing)
        if not isinstance(begun, clip_pb2.Item):
            return self._read(begun)
        if begun.HasField("text"):
            self._file_names.check(thing)
        return begun

    def _is_packed(self, index: int, reading: Reading, name: Any) -> bool:
        """Packs what is its turn, is read and has room, as nearly every text; whether it was."""
        if self._reading or isinstance(reading, Future):
            return False
        return self._pack.add(index, reading, name)

    def _advance(self, limit: int) -> Flow[None]:
        """Packs what is read, and waits until at most `limit` are not."""
        while self._reading and (len(self._reading) > limit or _is_ready(self._reading[0][1])):
            index, reading, name = self._reading.popleft()
            item = yield from _settled(index, reading, name)
            if not self._pack.add(index, item, name):
                yield from self._dispatch()
                self._pack.add(index, item, name)

    def _dispatch(self) -> Flow[None]:
        """Sends the pack, as soon as fewer than `prefetch` are under way."""
        if not self._pack.indices:
            return
        yield from self._collect(self._prefetch - 1)
        request = self._pack.take_request()
        self._in_flight.append((self._pack, self._send(request) if request else None))
        self._pack = Pack(self._batch_size, self._options)

    def _collect(self, limit: int) -> Flow[None]:
        """Hands on the answers that are there, and waits until at most `limit` are not."""
        while self._in_flight and (len(self._in_flight) > limit or _is_done(self._in_flight[0][1])):
            pack, answer = self._in_flight.popleft()
            try:
                response = (yield answer).encode if answer else None
                batch = pack.batch(response)
            except Exception as error:
                self._gathered.add(pack.failed(error))
                raise
            self._gathered.add(batch, response.truncated if response else 0)

    def _salvage(self) -> None:
        """Keeps what was answered out of turn when the call ends with an error."""
        for pack, answer in self._in_flight:
            try:
                response = answer.result(0).encode if answer else None
                batch = pack.batch(response)
            except Exception as error:
                batch = pack.failed(error)
            self._gathered.keep(batch)

    def _cancel(self) -> None:
        for _, reading, _ in self._reading:
            if isinstance(reading, Future):
                reading.cancel()
        for _, answer in self._in_flight:
            if answer:
                answer.cancel()


def iterate(things: Any, name: str = "encode") -> Things:
    """The items of what was passed. Raises TypeError where that is one item, not several."""
    single = isinstance(things, (str, bytes, bytearray, memoryview, dict))
    single = single or (isinstance(things, np.ndarray) and things.ndim in (2, 3))
    single = single or (inputs.is_document(things) and not hasattr(things, "__getitem__"))
    if not single:
        if hasattr(things, "__aiter__"):
            stream: AsyncIterator[Any] = things.__aiter__()
            return stream
        if isinstance(things, Iterable):
            return iter(things)
    shown = repr(things)
    shown = shown if len(shown) <= 40 else "item"
    raise TypeError(f"pass several items, not one {type(things).__name__}: {name}([{shown}])")


def _pull(things: Things) -> Flow[Any]:
    if isinstance(things, Iterator):
        return next(things, _END)
    try:
        return (yield things.__anext__())
    except StopAsyncIteration:
        return _END


def _settled(index: int, reading: Reading, name: Any) -> Flow[clip_pb2.Item | ItemFailure]:
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
    embeddings = response.embeddings  # each look at it makes a copy
    in_range = all(error.index < rows for error in response.errors)
    if response.count != rows or len(embeddings) != rows * response.dim * 4 or not in_range:
        raise ServerError(
            f"the answer to {rows} items holds {response.count} x {response.dim} embeddings "
            f"in {len(embeddings)} bytes"
        )
    matrix: NDArray[np.float32] = np.frombuffer(embeddings, "<f4")
    return matrix.reshape(rows, response.dim)
