"""Admission by expected wait: refuses a request that would wait longer than the server promises.

The work in flight, over the rate at which the replicas are measured to do it, is the time that a
new request waits. Both are known in the gateway, so a refusal costs no way to a replica. Until the
rate is known, a few requests try it out, and others wait for what these show.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import NamedTuple

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.replicas import Counts, ReplicaPool
from clip_server.launch.gateway_group import SIZE_CLASSES, WorkInFlight

# Between two looks at what the replicas have done: while requests wait for the rate, and else.
_TRIAL_SECONDS, _BUSY_SECONDS = 0.02, 0.25
# Texts and images in flight on each replica while their rate is tried out: images take longer.
_TRIAL_ITEMS = 16, 4
# A replica that computes one batch after the other has at least this much to do. With less it may
# be waiting for requests, so it is at least as fast as it seems.
_LOADED_SECONDS = 0.5
# The rate is an average over about this many of the last seconds of work: batches end in bursts,
# and over less, what has not ended yet would seem slow.
_MEMORY_SECONDS = 1.0
_LARGEST_CLASS = SIZE_CLASSES - 1
# A request may wait for so many others of its size, for up to so many times `max_wait`: a client
# that has its requests in flight, 8 by default, keeps the model busy, and need not send them again.
_MOST_AHEAD, _LONGER = 7, 2
# The least time after which a refused request may come again.
_LEAST_RETRY_SECONDS = 0.5


class Work(NamedTuple):
    """The items of a request that are encoded."""

    texts: int = 0
    images: int = 0

    @classmethod
    def of(cls, items: Sequence[pb.Item]) -> Work:
        """The work that items are."""
        others = [item for item in items if not item.HasField("text")]
        images = sum(item.HasField("image") or item.uri.startswith("data:image") for item in others)
        return cls(len(items) - images, images)

    @property
    def size_class(self) -> int:
        """Requests of up to twice as many items are in one class."""
        return min((self.texts + self.images).bit_length(), _LARGEST_CLASS)


class Backlog:
    """The work in flight on one encoder, and the time that it takes.

    pool: the encoder's replicas.
    max_wait: seconds that a request may be expected to wait for its turn; 0: any time.
    in_flight: the work, that of other gateways too.
    """

    def __init__(self, pool: ReplicaPool, max_wait: float, in_flight: WorkInFlight) -> None:
        self._pool, self._max_wait = pool, max_wait
        self._in_flight = in_flight
        self._rate = _Rate()
        self._trials = [_Trial(items, len(pool), max_wait) for items in _TRIAL_ITEMS]
        self._busy, self._busy_since = asyncio.Event(), math.inf

    @asynccontextmanager
    async def hold(self, work: Work) -> AsyncIterator[None]:
        """Counts work as in flight.

        Raises:
            RequestError: it would wait for too long.
        """
        async with self._trial(work):
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
        seconds = self._rate.seconds(work)
        allowed = max(self._max_wait, seconds, min(_LONGER * self._max_wait, _MOST_AHEAD * seconds))
        if wait > allowed:
            raise _refusal(
                f"this request would wait for {wait:.1f} s, and at most {allowed:.3g} s are "
                "accepted (max_wait)",
                wait - allowed,
            )

    async def watch(self) -> None:
        """Measures the rate, for ever."""
        before: _Reading | None = None
        while True:
            await self._busy.wait()
            began = before.time if before else time.monotonic()
            is_urgent = before is None or any(trial.is_full for trial in self._trials)
            await asyncio.sleep(_TRIAL_SECONDS if is_urgent else _BUSY_SECONDS)
            if self._busy_since > began:  # it was idle meanwhile
                before = None
                continue
            now = await self._read()
            if before is None or self._measure(before, now):
                before = now

    async def _read(self) -> _Reading:
        counts = await self._pool.counts()
        return _Reading(
            time.monotonic(),
            counts,
            self._expected_wait() > _LOADED_SECONDS,
            [trial.is_full for trial in self._trials],
        )

    def _measure(self, before: _Reading, now: _Reading) -> bool:
        """Takes what was done between two readings into account. Returns whether anything was."""
        done, seconds = _work_between(before.counts, now.counts), now.time - before.time
        are_tried = [
            was and still for was, still in zip(before.are_tried, now.are_tried, strict=True)
        ]
        tried = Work(*(count * is_tried for count, is_tried in zip(done, are_tried, strict=True)))
        if any(tried):
            self._rate.learn(tried, max(seconds - self._rate.seconds(done), seconds / 100))
            for count, trial in zip(tried, self._trials, strict=True):
                if count:
                    trial.end()
        else:
            self._rate.adapt(done, seconds, before.is_loaded and now.is_loaded)
        return any(done)

    def _trial(self, work: Work) -> AbstractAsyncContextManager[None]:
        """The turn of a request to be tried out; none if its rate is known."""
        if not self._max_wait or self._rate.knows(work):
            return nullcontext()
        return self._trials[work.images > 0].turn(work)

    def _add(self, size_class: int, texts: int, images: int) -> None:
        self._in_flight.add(size_class, texts, images)
        if not self._in_flight.own_items:
            self._busy.clear()
            self._busy_since = math.inf
        elif self._busy_since == math.inf:
            self._busy.set()
            self._busy_since = time.monotonic()

    def _expected_wait(self, size_class: int = _LARGEST_CLASS) -> float:
        """Seconds until the turn of a request: half of the batches are of the smallest requests,
        the others of the oldest."""
        ahead, total = (
            self._rate.seconds(Work(*self._in_flight.up_to(each)))
            for each in (size_class, _LARGEST_CLASS)
        )
        return min(2 * ahead, total)


class _Reading(NamedTuple):
    """The replicas' counts at a time, and how busy they were.

    is_loaded: they had enough to do for one batch after the other.
    are_tried: whether further texts, and further images, waited for their rate to be known.
    """

    time: float
    counts: Counts
    is_loaded: bool
    are_tried: Sequence[bool]


class _Trial:
    """Lets a few requests of unknown rate begin, while the others wait for what these show.

    items: in flight on each replica. A request counts for no more, however large it is, so that
        each replica gets one, and only for those as large: smaller ones pass it.
    max_wait: seconds; a request that has waited for so long is refused.
    """

    def __init__(self, items: int, replicas: int, max_wait: float) -> None:
        self._most_of_request, self._max_wait = items, max_wait
        self._most: float = items * replicas
        self._begun: Counter[int] = Counter()  # items, by class of size
        self._waiting: dict[asyncio.Future[None], Work] = {}

    @property
    def is_full(self) -> bool:
        """Whether requests wait."""
        return bool(self._waiting)

    @asynccontextmanager
    async def turn(self, work: Work) -> AsyncIterator[None]:
        """Waits until a request may begin, or until the trial ends.

        Raises:
            RequestError: it has waited for too long.
        """
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = work
        self._begin_waiting()
        try:
            await asyncio.wait([turn], timeout=self._max_wait)
            if not turn.done():
                raise _refusal(
                    f"this request waited for {self._max_wait:.3g} s, the most that is accepted "
                    "(max_wait)"
                )
            yield
        finally:
            if turn.done():
                self._begun[work.size_class] -= self._items_of(work)
            else:
                del self._waiting[turn]
            self._begin_waiting()

    def end(self) -> None:
        """Lets all go on: their rate is known."""
        self._most = math.inf
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        for turn, work in [*self._waiting.items()]:
            items = self._items_of(work)
            ahead = sum(count for each, count in self._begun.items() if each <= work.size_class)
            if ahead + items <= self._most:
                del self._waiting[turn]
                self._begun[work.size_class] += items
                turn.set_result(None)

    def _items_of(self, work: Work) -> int:
        return min(sum(work), self._most_of_request)


class _Rate:
    """Estimates the seconds that a text and an image take, all replicas together."""

    def __init__(self) -> None:
        self._text = self._image = 0.0  # until they are known
        self._measured = 0.0  # seconds of work, of which the last count most

    def knows(self, work: Work) -> bool:
        """Whether it is known how long work takes."""
        return bool((self._text or not work.texts) and (self._image or not work.images))

    def seconds(self, work: Work) -> float:
        """Seconds that work takes, as far as it is known."""
        return work.texts * self._text + work.images * self._image

    def learn(self, done: Work, seconds: float) -> None:
        """Takes the first measurement of texts, of images or of both."""
        each = seconds / sum(done)
        self._measured = seconds
        self._text, self._image = (
            (done.texts and each) or self._text,
            (done.images and each) or self._image,
        )

    def adapt(self, done: Work, elapsed: float, is_loaded: bool) -> None:
        """Takes into account what was done in some seconds.

        is_loaded: there was more to do all the time.
        """
        expected = self.seconds(done)
        if not expected or (elapsed > expected and not is_loaded):
            return
        # Whichever took more of the time has more of the blame.
        share = done.texts * self._text / expected
        kept = self._measured * math.exp(-elapsed / _MEMORY_SECONDS)
        factor = (kept + elapsed) / (kept + expected)
        self._measured = kept + elapsed
        self._text *= factor**share
        self._image *= factor ** (1 - share)


def _work_between(before: Counts, after: Counts) -> Work:
    """What the replicas have done between two readings of their counters."""

    def grown(name: str) -> int:
        return round(sum(_growth(before[each][name], after[each][name]) for each in both))

    both = before.keys() & after.keys()
    texts, images = grown("texts"), grown("images")
    # Answered without computing them, most likely as items of the same kind.
    free = grown("deduplicated_items") + grown("cache_hits") + grown("failed_items")
    return Work(texts, images + free) if images and not texts else Work(texts + free, images)


def _growth(before: float, after: float) -> float:
    """The growth of a counter, which begins at 0 again when its replica is restarted."""
    return after - before if after >= before else after


def _refusal(why: str, retry_after: float = 0.0) -> RequestError:
    return RequestError(
        f"the server is full: {why}; try again in a moment",
        "RESOURCE_EXHAUSTED",
        retry_after=max(_LEAST_RETRY_SECONDS, retry_after),
    )
