"""Admission by expected wait: refuses a request that would wait longer than the server promises.

The work in flight, over the rate at which the replicas are measured to do it, is the time that a
new request waits. Both are known in the gateway, so a refusal costs no way to a replica.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.replicas import ReplicaPool

# Between two looks at what the replicas have done: while they work, and while they are idle.
_BUSY_SECONDS, _IDLE_SECONDS = 0.25, 1.0
# A replica that computes one batch after the other has at least this much to do. With less it may
# be waiting for requests, so it is at least as fast as it seems.
_LOADED_SECONDS = 0.5
# The share of a new measurement in the estimate.
_GAIN = 0.5
# The least time after which a refused request may come again.
_LEAST_RETRY_SECONDS = 0.5


class Work(NamedTuple):
    """The items of a request that are encoded."""

    texts: int = 0
    images: int = 0

    @classmethod
    def of(cls, items: Iterable[pb.Item]) -> Work:
        """The work that items are."""
        total = images = 0
        for item in items:
            total += 1
            images += item.HasField("image") or item.uri.startswith("data:image")
        return cls(total - images, images)

    @property
    def size_class(self) -> int:
        """Requests of up to twice as many items are in one class."""
        return (self.texts + self.images).bit_length()


class Backlog:
    """The work in flight on one encoder, and the time that it takes.

    pool: the encoder's replicas.
    max_wait: seconds that a request may be expected to wait for its turn; 0: any time.
    """

    def __init__(self, pool: ReplicaPool, max_wait: float) -> None:
        self._pool, self._max_wait = pool, max_wait
        self._in_flight: dict[int, Work] = {}  # by class of size
        self._rate = _Rate()
        self._busy_since = math.inf

    @contextmanager
    def hold(self, work: Work) -> Iterator[None]:
        """Counts work as in flight.

        Raises:
            RequestError: it would wait for too long.
        """
        self.refuse_if_late(work)
        self._add(work.size_class, work.texts, work.images)
        try:
            yield
        finally:
            self._add(work.size_class, -work.texts, -work.images)

    def refuse_if_late(self, work: Work) -> None:
        """Raises RequestError if a request would wait for longer than `max_wait` and than it takes
        to compute: a large one waits its turn among others like it."""
        if not self._max_wait:
            return
        wait = self._expected_wait(work.size_class)
        allowed = max(self._max_wait, self._rate.seconds(work))
        if wait > allowed:
            raise RequestError(
                f"the server is full: this request would wait for {wait:.1f} s, and at most "
                f"{allowed:.3g} s are accepted (max_wait); try again in a moment",
                "RESOURCE_EXHAUSTED",
                retry_after=max(_LEAST_RETRY_SECONDS, wait - allowed),
            )

    async def watch(self) -> None:
        """Measures the rate, for ever."""
        before: tuple[float, Mapping[str, Mapping[str, float]]] = 0.0, {}
        while True:
            counts = await self._pool.counts()
            now = time.monotonic()
            if self._busy_since <= before[0]:
                done = _work_between(before[1], counts)
                is_loaded = self._expected_wait() > _LOADED_SECONDS
                self._rate.measure(done, now - before[0], is_loaded)
            before = now, counts
            await asyncio.sleep(_BUSY_SECONDS if self._busy_since < math.inf else _IDLE_SECONDS)

    def _add(self, size_class: int, texts: int, images: int) -> None:
        held = self._in_flight.pop(size_class, Work())
        work = Work(held.texts + texts, held.images + images)
        if any(work):
            self._in_flight[size_class] = work
        if not self._in_flight:
            self._busy_since = math.inf
        elif self._busy_since == math.inf:
            self._busy_since = time.monotonic()

    def _expected_wait(self, size_class: float = math.inf) -> float:
        """Seconds until the turn of a request: half of the batches are of the smallest requests,
        the others of the oldest."""
        total = ahead = 0.0
        for each, work in self._in_flight.items():
            seconds = self._rate.seconds(work)
            total += seconds
            if each <= size_class:
                ahead += seconds
        return min(2 * ahead, total)


class _Rate:
    """Estimates the seconds that a text and an image take, all replicas together."""

    def __init__(self) -> None:
        self._text = self._image = 0.0  # until they are known

    def seconds(self, work: Work) -> float:
        """Seconds that work takes, as far as it is known."""
        return work.texts * self._text + work.images * self._image

    def measure(self, done: Work, elapsed: float, is_loaded: bool) -> None:
        """Takes into account what was done in some seconds.

        is_loaded: there was more to do all the time.
        """
        if not self._text and not self._image and any(done):
            each = elapsed / sum(done)
            self._text, self._image = done.texts and each, done.images and each
            return
        if done.texts and not self._text:
            self._text = max(elapsed - self.seconds(done), elapsed / 100) / done.texts
        if done.images and not self._image:
            self._image = max(elapsed - self.seconds(done), elapsed / 100) / done.images
        expected = self.seconds(done)
        if not expected or (elapsed > expected and not is_loaded):
            return
        # Whichever took more of the time has more of the blame.
        share = done.texts * self._text / expected
        factor = (elapsed / expected) ** _GAIN
        self._text *= factor**share
        self._image *= factor ** (1 - share)


def _work_between(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]
) -> Work:
    """What the replicas have done between two readings of their counters."""

    def grown(name: str) -> int:
        # A replica that has been restarted begins at 0 again.
        return round(sum(max(0, after[each][name] - before[each][name]) for each in both))

    both = before.keys() & after.keys()
    texts, images = grown("texts"), grown("images")
    # Answered without computing them, most likely as items of the same kind.
    free = grown("deduplicated_items") + grown("cache_hits") + grown("failed_items")
    return Work(texts, images + free) if images and not texts else Work(texts + free, images)
