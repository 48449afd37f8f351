"""What waits in the engine: requests' items, in queues that are fair to requests.

An item that several requests hold is one entry, computed once. It stands in each one's line,
and leaves the queue with whichever line comes first.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Tokens of padding that cost less than a batch of their own.
SHORT = 8
# Token counts that are taken as one length.
_STEP = 4


class Job:
    """One request under way.

    size: items of it.
    minibatch_size: a batch led by one of them holds at most so many.
    embeddings: [size, D]; NaN until an item's is there.
    errors: why an item has none, by its index.
    truncated: texts that were longer than the model's context.
    done: set when each item has the one or the other.
    prepared: when the last item was ready for the device, as of `time.perf_counter`.
    """

    __slots__ = (
        "_open", "_unprepared", "done", "embeddings", "errors", "minibatch_size", "number",
        "prepared", "size", "started", "truncated",
    )  # fmt: skip

    def __init__(self, number: int, size: int, dim: int, minibatch_size: int) -> None:
        self.number, self.size, self.minibatch_size = number, size, minibatch_size
        self.embeddings = np.full((size, dim), np.nan, np.float32)
        self.errors: dict[int, str] = {}
        self.truncated = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.started = time.perf_counter()
        self.prepared = self.started
        self._open = self._unprepared = size

    def close_preparation(self) -> None:
        """Notes that one more item is prepared."""
        self._unprepared -= 1
        if not self._unprepared:
            self.prepared = time.perf_counter()

    def fail(self, index: int, message: str) -> None:
        """Ends an item without an embedding."""
        self.errors[index] = message
        self._close_item()

    def succeed(self, index: int, embedding: NDArray[np.float32], truncated: bool) -> None:
        """Ends an item with its embedding, [D]. truncated: it is of a text that was cut."""
        self.embeddings[index] = embedding
        self.truncated += truncated
        self._close_item()

    def is_open(self) -> bool:
        """Whether an item has neither yet."""
        return self._open > 0

    def _close_item(self) -> None:
        self._open -= 1
        if not self._open and not self.done.done():
            self.done.set_result(None)


class Entry:
    """A text or picture under way, and every place of a request that its embedding goes to.

    item: as the client sent it. content: what the device takes, None until it is prepared.
    truncated: whether it is a text longer than the model's context.
    """

    __slots__ = ("content", "item", "places", "queue", "truncated")

    def __init__(self, item: str | bytes, job: Job, index: int) -> None:
        self.item = item
        self.content: NDArray[Any] | None = None
        self.truncated = False
        self.places = [(job, index)]
        self.queue: Queue | None = None  # where it waits

    def add(self, job: Job, index: int) -> None:
        """Adds a place, and the entry to that job's line if it waits."""
        if self.queue is not None and job not in self.jobs():
            self.queue.line_up(job, self)
        self.places.append((job, index))
        if self.content is not None:
            job.close_preparation()

    def jobs(self) -> Collection[Job]:
        """The jobs that hold it."""
        if len(self.places) == 1:  # nearly always
            return (self.places[0][0],)
        return dict.fromkeys(job for job, _ in self.places)

    def leave(self, job: Job) -> bool:
        """Takes a job's places away. Whether any are left."""
        self.places = [place for place in self.places if place[0] is not job]
        return bool(self.places)

    def prepare(self, content: NDArray[Any], truncated: bool) -> bool:
        """Takes what the device takes. Whether anyone still waits for it."""
        self.content, self.truncated = content, truncated
        self.places = [place for place in self.places if not place[0].done.done()]
        for job, _ in self.places:
            job.close_preparation()
        return bool(self.places)

    def succeed(self, embedding: NDArray[np.float32]) -> None:
        """Ends it with its embedding, [D]."""
        for job, index in self.places:
            job.succeed(index, embedding, self.truncated)

    def fail(self, message: str) -> None:
        """Ends it without one."""
        for job, index in self.places:
            if self.content is None:
                job.close_preparation()
            job.fail(index, message)


class Turns:
    """Whose turn it is: the smallest request's, so that it does not wait for large ones, and
    every second time the oldest's, so that it does not wait for ever."""

    def __init__(self) -> None:
        self._oldest = True

    def next(self, jobs: Iterable[Job]) -> Job:
        """One of `jobs`."""
        self._oldest = not self._oldest
        return min(jobs, key=by_age if self._oldest else by_size)


def by_age(job: Job) -> int:
    """Sorts the oldest first."""
    return job.number


def by_size(job: Job) -> tuple[int, int]:
    """Sorts the smallest first."""
    return job.size, job.number


class Queue:
    """Entries of many jobs."""

    def __init__(self) -> None:
        self._lines: dict[Job, deque[Entry]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def jobs(self) -> Collection[Job]:
        """Those with a line."""
        return self._lines.keys()

    def push(self, entry: Entry) -> None:
        """Puts an entry at the end of the line of each job that holds it."""
        entry.queue = self
        self._length += 1
        for job in entry.jobs():
            self.line_up(job, entry)

    def line_up(self, job: Job, entry: Entry) -> None:
        """Puts an entry that waits here in one more job's line."""
        line = self._lines.get(job)
        if line is None:
            line = self._lines[job] = deque()
        line.append(entry)

    def take(self, count: int, leader: Job) -> list[Entry]:
        """Up to `count` entries: the leader's, then one of each other job in turn."""
        taken = self.take_of(leader, count)
        while self._length and len(taken) < count:
            job = next(iter(self._lines))
            taken += self.take_of(job, 1)  # which puts it at the end
        return taken

    def take_of(self, job: Job, count: int) -> list[Entry]:
        """Up to `count` entries of one job."""
        line = self._lines.pop(job, None) or deque()
        taken: list[Entry] = []
        while line and len(taken) < count:
            entry = line.popleft()
            if entry.queue is self:  # else taken with another job's line
                entry.queue = None
                taken.append(entry)
        if line:
            self._lines[job] = line
        self._shorten(len(taken))
        return taken

    def discard(self, job: Job) -> list[Entry]:
        """Drops a job. Gives the entries that no other job holds."""
        dropped = []
        for entry in self._lines.pop(job, ()):
            if entry.queue is self and not entry.leave(job):
                entry.queue = None
                dropped.append(entry)
        self._shorten(len(dropped))
        return dropped

    def _shorten(self, count: int) -> None:
        self._length -= count
        if not self._length:  # what is left in the lines was taken with another's
            self._lines.clear()


class TextQueue:
    """Tokenized texts, taken in batches of like lengths.

    A batch is as long as its longest text, so unlike ones would pay for each other's padding.
    """

    def __init__(self) -> None:
        self._queues: dict[int, Queue] = {}  # by length, in steps

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def jobs(self) -> Collection[Job]:
        """Those with a text here."""
        return set().union(*(queue.jobs() for queue in self._queues.values()))

    def push(self, entry: Entry) -> None:
        """Adds a text whose content is its tokens."""
        assert entry.content is not None
        step = -(-len(entry.content) // _STEP)
        queue = self._queues.get(step)
        if queue is None:
            queue = self._queues[step] = Queue()
        queue.push(entry)

    def take(self, count: int, leader: Job) -> list[Entry]:
        """Up to `count` texts: as long as one of the leader's, then of the lengths next to it."""
        longest = next(step for step, queue in self._queues.items() if leader in queue.jobs())
        taken: list[Entry] = []
        for step in sorted(self._queues, key=lambda step: abs(step - longest)):
            if len(taken) < count and _are_alike(step * _STEP, longest * _STEP):
                taken += self._queues[step].take(count - len(taken), leader)
        return self._without_empty(taken)

    def take_of(self, job: Job, count: int) -> list[Entry]:
        """Up to `count` texts of one job."""
        taken: list[Entry] = []
        for queue in self._queues.values():
            taken += queue.take_of(job, count - len(taken))
        return self._without_empty(taken)

    def discard(self, job: Job) -> list[Entry]:
        """See Queue."""
        dropped = [entry for queue in self._queues.values() for entry in queue.discard(job)]
        return self._without_empty(dropped)

    def _without_empty(self, result: list[Entry]) -> list[Entry]:
        self._queues = {step: queue for step, queue in self._queues.items() if queue}
        return result


def _are_alike(a: int, b: int) -> bool:
    """Whether two lengths belong in one batch: a batch more costs less than such padding."""
    return max(a, b) <= 2 * min(a, b) + SHORT
