"""Queues of the engine that are fair to requests: each request has a line of its own.

An item that several requests sent is one pending item, computed once. It is in the line of each of
these requests, and leaves the queue with whichever line is served first.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_server import logs
from clip_server.engine.cache import content_key

# Tokens of padding that cost less than a batch of their own.
_CHEAP_PADDING = 8
# Texts whose token counts differ by less are queued as if they were equally long.
_LENGTH_STEP = 4


class PendingRequest:
    """One request in flight.

    size: number of its items.
    minibatch_size: the largest batch that may be formed around one of its items.
    request_id: its name in the log.
    embeddings: [size, D] float32; NaN until an item's is computed.
    errors: messages by index, for the items that failed.
    truncated_items: indices of the texts longer than the model's context.
    tokens: number of tokens of the texts that have embeddings.
    done: set when every item has an embedding or an error.
    prepared, submitted: times at which the last item was ready for the device, and was handed to
        it, by `time.perf_counter`.
    """

    __slots__ = (
        "_open", "_unprepared", "done", "embeddings", "errors", "minibatch_size", "number",
        "prepared", "request_id", "size", "started", "submitted", "tokens",
        "truncated_items",
    )  # fmt: skip

    def __init__(self, number: int, size: int, dim: int, minibatch_size: int) -> None:
        self.number, self.size, self.minibatch_size = number, size, minibatch_size
        self.request_id = logs.request_id.get()
        self.embeddings = np.full((size, dim), np.nan, np.float32)
        self.errors: dict[int, str] = {}
        self.truncated_items: list[int] = []
        self.tokens = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = time.perf_counter()
        self.prepared = self.submitted = self.started
        self._open = self._unprepared = size

    @property
    def preprocess_seconds(self) -> float:
        """Time until the last item was ready for the device."""
        return self.prepared - self.started

    @property
    def queue_seconds(self) -> float:
        """Time from then until the last item was handed to the device; 0 if none had to be."""
        return max(0.0, self.submitted - self.prepared)

    def count_prepared(self) -> None:
        """Notes that one more item is prepared, or failed before it was."""
        self._unprepared -= 1
        if not self._unprepared:
            self.prepared = time.perf_counter()

    def fail(self, index: int, message: str) -> None:
        """Ends an item with an error."""
        self.errors[index] = message
        self._close_item()

    def succeed(
        self, index: int, embedding: NDArray[np.float32], truncated: bool, tokens: int
    ) -> None:
        """Ends an item with its embedding, [D].

        truncated: its text was longer than the context.
        tokens: of its text that the model read; 0 of an image.
        """
        self.embeddings[index] = embedding
        if truncated:
            self.truncated_items.append(index)
        self.tokens += tokens
        self._close_item()

    def is_open(self) -> bool:
        """Whether any item has neither an embedding nor an error."""
        return self._open > 0

    def _close_item(self) -> None:
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)


class PendingItem:
    """A text or image in flight.

    source: the text, or the encoded image, as the client sent it; None of an image that is
        decoded, which would take more memory than its pixels.
    fingerprint: by which the same item is found.
    is_image: whether it is an image; else a text.
    content: its tokens or pixels; None until it is prepared.
    truncated: whether it is a text longer than the model's context.
    recipients: the requests that wait for its embedding, each with the item's index in it.
    """

    __slots__ = (
        "_key", "content", "fingerprint", "is_image", "queue", "recipients", "source", "truncated",
    )  # fmt: skip

    def __init__(
        self, source: str | bytes, fingerprint: Any, request: PendingRequest, index: int
    ) -> None:
        self.source: str | bytes | None = source
        self.fingerprint, self.is_image = fingerprint, isinstance(source, bytes)
        self._key = b""
        self.content: NDArray[Any] | None = None
        self.truncated = False
        self.recipients = [(request, index)]
        self.queue: Queue | None = None  # the one it waits in

    @property
    def key(self) -> bytes:
        """The `content_key` of the text or image."""
        return self._key if self.source is None else content_key(self.source)

    def is_of(self, item: str | bytes) -> bool:
        """Whether it is this text or image."""
        if self.source is None:
            return self._key == content_key(item)
        return self.source == item

    @property
    def tokens(self) -> int:
        """Number of tokens of a text; 0 of an image, and until it is tokenized."""
        return 0 if self.is_image or self.content is None else len(self.content)

    def add(self, request: PendingRequest, index: int) -> None:
        """Adds a recipient, and puts the item into that request's line if it waits in a queue."""
        if self.queue is not None and request not in self.requests():
            self.queue.enqueue_for(request, self)
        self.recipients.append((request, index))
        if self.content is not None:
            request.count_prepared()

    def requests(self) -> Collection[PendingRequest]:
        """The requests among the recipients, each once."""
        if len(self.recipients) == 1:  # nearly always
            return (self.recipients[0][0],)
        return dict.fromkeys(request for request, _ in self.recipients)

    def remove(self, request: PendingRequest) -> bool:
        """Removes a request from the recipients. Returns whether any are left."""
        self.recipients = [each for each in self.recipients if each[0] is not request]
        return bool(self.recipients)

    def prepare(self, content: NDArray[Any], truncated: bool, key: bytes = b"") -> bool:
        """Stores tokens or pixels. Returns whether any request still waits for the item.

        key: of an image, by which it is known without its source.
        """
        self.content, self.truncated = content, truncated
        if key:
            self.source, self._key = None, key
        self.recipients = [each for each in self.recipients if not each[0].done.done()]
        for request, _ in self.recipients:
            request.count_prepared()
        return bool(self.recipients)

    def succeed(self, embedding: NDArray[np.float32]) -> None:
        """Ends it with its embedding, [D], for all recipients."""
        for request, index in self.recipients:
            request.succeed(index, embedding, self.truncated, self.tokens)

    def fail(self, message: str) -> None:
        """Ends it with an error, for all recipients."""
        for request, index in self.recipients:
            if self.content is None:
                request.count_prepared()
            request.fail(index, message)


class FairScheduler:
    """Alternates between the smallest request and the oldest.

    The smallest need not wait behind large ones, and the oldest does not starve.
    """

    def __init__(self) -> None:
        self._oldest = True

    def next(self, requests: Iterable[PendingRequest]) -> PendingRequest:
        """Chooses one of `requests`, of which there is at least one."""
        self._oldest = not self._oldest
        return min(requests, key=by_age if self._oldest else by_size)


def by_age(request: PendingRequest) -> int:
    """Sort key: the oldest first."""
    return request.number


def by_size(request: PendingRequest) -> tuple[int, int]:
    """Sort key: the smallest first, the older of two equal ones."""
    return request.size, request.number


class Queue:
    """Pending items, in one line per request."""

    def __init__(self) -> None:
        self._lines: dict[PendingRequest, deque[PendingItem]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def requests(self) -> Collection[PendingRequest]:
        """The requests that have a line."""
        return self._lines.keys()

    def push(self, pending: PendingItem) -> None:
        """Adds an item to the line of each request that waits for it."""
        pending.queue = self
        self._length += 1
        for request in pending.requests():
            self.enqueue_for(request, pending)

    def enqueue_for(self, request: PendingRequest, pending: PendingItem) -> None:
        """Puts an item of this queue into one more request's line."""
        line = self._lines.get(request)
        if line is None:
            line = self._lines[request] = deque()
        line.append(pending)

    def take(self, count: int, leader: PendingRequest) -> list[PendingItem]:
        """Removes up to `count` items: the leader's, then one of each other request in turn."""
        taken = self.take_from(leader, count)
        while self._length and len(taken) < count:
            request = next(iter(self._lines))
            taken += self.take_from(request, 1)  # which moves its line to the end
        return taken

    def take_from(self, request: PendingRequest, count: int) -> list[PendingItem]:
        """Removes up to `count` items of one request."""
        line = self._lines.pop(request, None) or deque()
        taken: list[PendingItem] = []
        while line and len(taken) < count:
            pending = line.popleft()
            if pending.queue is self:  # else taken with another request's line
                pending.queue = None
                taken.append(pending)
        if line:
            self._lines[request] = line
        self._shorten(len(taken))
        return taken

    def discard(self, request: PendingRequest) -> list[PendingItem]:
        """Drops a request. Returns the items that no other request waits for."""
        dropped = []
        for pending in self._lines.pop(request, ()):
            if pending.queue is self and not pending.remove(request):
                pending.queue = None
                dropped.append(pending)
        self._shorten(len(dropped))
        return dropped

    def _shorten(self, count: int) -> None:
        self._length -= count
        if not self._length:  # what is left in the lines was taken with another's
            self._lines.clear()


class TextQueue:
    """Tokenized texts, taken in batches of similar length.

    A batch is padded to its longest text, so short texts would pay for a long one among them.
    """

    def __init__(self) -> None:
        self._queues: dict[int, Queue] = {}  # by length in steps

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def requests(self) -> Collection[PendingRequest]:
        """The requests that have a text here."""
        return set().union(*(queue.requests() for queue in self._queues.values()))

    def push(self, pending: PendingItem) -> None:
        """Adds a text whose content is its tokens."""
        assert pending.content is not None
        step = -(-len(pending.content) // _LENGTH_STEP)
        queue = self._queues.get(step)
        if queue is None:
            queue = self._queues[step] = Queue()
        queue.push(pending)

    def take(self, count: int, leader: PendingRequest) -> list[PendingItem]:
        """Removes up to `count` texts: as long as one of the leader's, then the next lengths."""
        target = next(step for step, queue in self._queues.items() if leader in queue.requests())
        taken: list[PendingItem] = []
        for step in sorted(self._queues, key=lambda step: abs(step - target)):
            if len(taken) < count and _fit_one_batch(step * _LENGTH_STEP, target * _LENGTH_STEP):
                taken += self._queues[step].take(count - len(taken), leader)
        self._remove_empty()
        return taken

    def take_from(self, request: PendingRequest, count: int) -> list[PendingItem]:
        """Removes up to `count` texts of one request."""
        taken: list[PendingItem] = []
        for queue in self._queues.values():
            taken += queue.take_from(request, count - len(taken))
        self._remove_empty()
        return taken

    def discard(self, request: PendingRequest) -> list[PendingItem]:
        """Drops a request. Returns the texts that no other request waits for."""
        dropped = [each for queue in self._queues.values() for each in queue.discard(request)]
        self._remove_empty()
        return dropped

    def _remove_empty(self) -> None:
        self._queues = {step: queue for step, queue in self._queues.items() if queue}


def _fit_one_batch(a: int, b: int) -> bool:
    """Whether padding two lengths to the longer costs less than a batch for each."""
    return max(a, b) <= 2 * min(a, b) + _CHEAP_PADDING
