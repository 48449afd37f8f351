"""The engine: texts and images in, embeddings out, one batch at a time.

    admission -> preprocessing pool -> ready entries -> batch -> embeddings

Texts are tokenized and pictures decoded as soon as they arrive. A batch is formed only when
the device is free ("late binding"): whatever is ready by then, of all requests together, goes
into it; a device that takes next to no time for a batch gets several. There is no timer, so an
idle engine adds no wait. Requests take turns, so a large one does not keep a small one waiting,
and on a device that can do two things at once a small one need not wait at all. An item that
cannot be encoded fails alone; one that is under way already is not computed again; what no one
waits for any more is not computed.

The engine knows model cards and a runtime; of Jina it knows nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_server.engine.cache import Cache
from clip_server.engine.halving import Halving
from clip_server.engine.scheduler import Entry, Job, Queue, TextQueue, Turns, by_size
from clip_server.engine.workers import Workers
from clip_server.errors import ItemError, RequestError
from clip_server.models import tokenizer_files
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.protocol import Runtime

log = logging.getLogger(__name__)

# A text, an encoded picture, or an item already found unfit.
Item: TypeAlias = str | bytes | ItemError
# What the device takes at once: texts, or pictures.
Batch: TypeAlias = list[Entry]

# Texts tokenized in one call to the pool: about a millisecond of work.
TOKENIZE_CHUNK = 128
# A request of so many texts at most, each of ASCII and so many characters, is tokenized as it
# arrives: handing the texts to the pool would cost more than the work, which is a millisecond.
QUICK_TEXTS, QUICK_LENGTH = 128, 1024
# Batches' worth of decoded pictures that may wait for the device: enough to keep it busy, and
# a bound on memory however large a request is.
DECODED_AHEAD = 4
# Items of a request that may use the express lane.
SMALL = 4
# Batches go to the device together while they take it less than this: handing something over and
# back costs a third of a millisecond, in which a GPU would have nothing to do.
HAND_OVER_SECONDS = 0.002
MAX_QUEUED_ITEMS = 16_384


@dataclass(frozen=True)
class Encoded:
    """What became of a request's items.

    embeddings: [N, D]; the row of an item that failed is NaN.
    errors: why, by the item's index.
    truncated: texts that were longer than the model's context, and embedded without their end.
    preprocess_seconds, total_seconds: until the last item was ready for the device, and
        until the answer.
    """

    embeddings: NDArray[np.float32]
    errors: dict[int, str]
    truncated: int
    preprocess_seconds: float
    total_seconds: float


@dataclass
class Metrics:
    """What an engine has done since it started, and how much waits now (`in_flight_items`)."""

    texts: int = 0
    images: int = 0
    failed_items: int = 0
    truncated_texts: int = 0
    deduplicated_items: int = 0
    requests: int = 0
    refused_requests: int = 0
    expired_requests: int = 0
    cancelled_requests: int = 0
    in_flight_items: int = 0
    batches: int = 0
    batched_items: int = 0
    priority_batches: int = 0
    inference_seconds: float = 0.0


class _Lane:
    """What is on the device at a time. `bulk`: it is of requests that are not small."""

    def __init__(self) -> None:
        self.busy = self.bulk = False


class Engine:
    """Encodes texts and images with a runtime. Use it from one event loop.

    minibatch_size: items the runtime takes at once, at most.
    num_worker_preprocess: threads that tokenize and decode.
    transform: how pictures are decoded; None: the card's own way with scaled decoding.
    max_queued_items: while so many are under way, further requests are refused.
    cache_bytes: of embeddings kept to answer the same items again; 0: none.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        minibatch_size: int = 32,
        num_worker_preprocess: int = 4,
        transform: ImageTransform | None = None,
        max_queued_items: int = MAX_QUEUED_ITEMS,
        cache_bytes: int = 0,
    ) -> None:
        self.runtime = runtime
        self.card = runtime.card
        self.metrics = Metrics()
        self._encode_image = Halving(runtime.encode_image)
        self._encode_text = Halving(runtime.encode_text)
        self._minibatch_size = minibatch_size
        self._max_queued_items = max_queued_items
        self._tokenizer = tokenizer_for(tokenizer_files.located(self.card.text))
        self._transform = transform or ImageTransform(self.card.image)
        self.cache = Cache(cache_bytes)
        self._workers = num_worker_preprocess
        self._pool = Workers(num_worker_preprocess, "preprocess")
        # Some frameworks want to be called from one and the same thread.
        self._device = Workers(2 if runtime.concurrent else 1, "device")
        self._pace = _Pace()
        self._numbers = itertools.count()
        self._under_way: dict[Any, Entry] = {}  # by fingerprint
        self._texts, self._pictures = Queue(), Queue()  # waiting for the pool
        self._ready_texts, self._ready_pictures = TextQueue(), Queue()  # waiting for the device
        self._pool_turns, self._device_turns = Turns(), Turns()
        self._preparing = 0
        self._main, self._express = _Lane(), _Lane()

    async def encode(
        self, items: Sequence[Item], *, minibatch_size: int = 0, timeout: float | None = None
    ) -> Encoded:
        """Embeddings of `items`, in their order. Cancelling drops what has not been begun.

        minibatch_size: a batch led by one of these holds at most so many; 0, or more than the
            engine's own: the engine's own.
        timeout: seconds until it is given up, which drops the same; None: never.

        Raises:
            RequestError: RESOURCE_EXHAUSTED while too much is under way; DEADLINE_EXCEEDED.
        """
        self._refuse_if_full(len(items))
        size = min(minibatch_size or self._minibatch_size, self._minibatch_size)
        job = Job(next(self._numbers), len(items), self.card.dim, size)
        timer = timeout and asyncio.get_running_loop().call_later(timeout, self._expire, job)
        self.metrics.in_flight_items += len(items)
        try:
            if items:
                self._admit(job, items)
                await job.done
        except asyncio.CancelledError:
            if job.done.cancelled():
                self.metrics.cancelled_requests += 1
            else:
                job.done.exception()  # it ended in the same moment, and was counted so
            raise
        finally:
            self.metrics.in_flight_items -= len(items)
            self.metrics.failed_items += len(job.errors)
            self.metrics.truncated_texts += job.truncated
            if job.is_open():
                self._drop(job)
            if timer:
                timer.cancel()
        return Encoded(
            embeddings=job.embeddings,
            errors=dict(sorted(job.errors.items())),
            truncated=job.truncated,
            preprocess_seconds=job.prepared - job.started,
            total_seconds=time.perf_counter() - job.started,
        )

    def close(self) -> None:
        """Ends the threads, after what they have begun."""
        self._pool.close()
        self._device.close()

    def _refuse_if_full(self, count: int) -> None:
        self.metrics.requests += 1
        under_way = self.metrics.in_flight_items
        # One that is larger than the bound is taken by an idle engine.
        if under_way and under_way + count > self._max_queued_items:
            self.metrics.refused_requests += 1
            raise RequestError(
                f"the server is full: {under_way:,} items are under way, and it takes "
                f"{self._max_queued_items:,} at most; try again in a moment",
                "RESOURCE_EXHAUSTED",
                retry_after=1.0,
            )

    def _expire(self, job: Job) -> None:
        if not job.done.done():
            self.metrics.expired_requests += 1
            job.done.set_exception(
                RequestError("the request's time was over before its answer", "DEADLINE_EXCEEDED")
            )

    def _admit(self, job: Job, items: Sequence[Item]) -> None:
        for index, item in enumerate(items):
            if isinstance(item, ItemError):
                job.close_preparation()
                job.fail(index, str(item))
            elif (known := self.cache.get(item)) is not None:
                job.close_preparation()
                job.succeed(index, *known)
            else:
                self._place(item, job, index)
        self._advance()

    def _place(self, item: str | bytes, job: Job, index: int) -> None:
        fingerprint = _fingerprint(item)
        entry = self._under_way.get(fingerprint)
        if entry is not None and entry.item == item:
            self.metrics.deduplicated_items += 1
            entry.add(job, index)
            return
        entry = self._under_way[fingerprint] = Entry(item, job, index)
        if isinstance(item, bytes):
            self._pictures.push(entry)
        elif job.size <= QUICK_TEXTS and len(item) <= QUICK_LENGTH and item.isascii():
            entry.content, entry.truncated = self._tokenizer.tokenize(item)
            job.close_preparation()
            self._ready_texts.push(entry)
        else:
            self._texts.push(entry)

    def _drop(self, job: Job) -> None:
        for queue in (self._texts, self._pictures, self._ready_texts, self._ready_pictures):
            for entry in queue.discard(job):
                self._forget(entry)
        self._advance()

    def _forget(self, entry: Entry) -> None:
        fingerprint = _fingerprint(entry.item)
        if self._under_way.get(fingerprint) is entry:
            del self._under_way[fingerprint]

    def _advance(self) -> None:
        """Starts whatever can be started now; called after every change."""
        while self._preparing < self._workers:
            if self._texts:  # all of them: tokens are small, and a late one is not held up
                leader = self._pool_turns.next(self._texts.jobs())
                self._prepare(self._texts, TOKENIZE_CHUNK, leader, self._tokenizer.tokenize)
            elif (job := self._next_to_decode()) is not None:
                self._prepare(self._pictures, 1, job, self._decode)
            else:
                break
        ready = self._ready_texts or self._ready_pictures
        if ready and not self._main.busy:
            self._infer(self._main, self._next_batches())
        if ready and self._main.busy and not self._express.busy and self.runtime.concurrent:
            self._infer(self._express, self._next_beside())

    def _next_to_decode(self) -> Job | None:
        """Whose picture is decoded next; for small requests there is always room."""
        jobs = self._pictures.jobs()
        if jobs and len(self._ready_pictures) < DECODED_AHEAD * self._minibatch_size:
            return self._pool_turns.next(jobs)
        smallest = min(jobs, key=by_size, default=None)
        return smallest if smallest and smallest.size <= SMALL else None

    def _prepare(
        self, queue: Queue, count: int, leader: Job, prepare: Callable[[Any], Any]
    ) -> None:
        """Tokenizes or decodes the next entries of `queue` in the pool."""
        ready = self._ready_texts if queue is self._texts else self._ready_pictures
        entries = queue.take(count, leader)
        self._preparing += 1

        def finish(contents: list[Any]) -> None:
            self._preparing -= 1
            for entry, content in zip(entries, contents, strict=True):
                if isinstance(content, ItemError):
                    entry.fail(str(content))
                elif entry.prepare(*content):
                    ready.push(entry)
                    continue
                self._forget(entry)
            self._advance()

        items = [entry.item for entry in entries]
        self._pool.submit(lambda: [_attempt(prepare, item) for item in items], finish)

    def _decode(self, image: bytes) -> tuple[NDArray[np.uint8], bool]:
        """An image as the device takes it. False, as with tokens: it is not truncated."""
        return self._transform(image), False

    def _next_batches(self) -> list[Batch]:
        """A batch, and those behind it that the device is done with in next to no time."""
        batches, seconds = [], 0.0
        while seconds < HAND_OVER_SECONDS and (self._ready_texts or self._ready_pictures):
            batches.append(self._next_batch())
            seconds += self._pace.expected(batches[-1])
        return batches

    def _next_batch(self) -> Batch:
        texts, pictures = self._ready_texts, self._ready_pictures
        leader = self._device_turns.next([*texts.jobs(), *pictures.jobs()])
        queue = texts if leader in texts.jobs() else pictures
        return queue.take(leader.minibatch_size, leader)

    def _next_beside(self) -> list[Batch]:
        """What goes to the device beside a batch: the next full one, where that is copied while
        the first is computed; else a small request beside bulk."""
        ready = max(len(self._ready_texts), len(self._ready_pictures))
        if self.runtime.overlaps and ready >= self._minibatch_size:
            return [self._next_batch()]
        small = self._next_small_batch() if self._main.bulk else []
        return [small] if small else []

    def _next_small_batch(self) -> Batch:
        """What is ready of the smallest request, if it is a small one."""
        texts, pictures = self._ready_texts, self._ready_pictures
        job = min([*texts.jobs(), *pictures.jobs()], key=by_size, default=None)
        if job is None or job.size > SMALL:
            return []
        return texts.take_of(job, SMALL) or pictures.take_of(job, SMALL)

    def _infer(self, lane: _Lane, batches: list[Batch]) -> None:
        """Hands batches, each of texts or of pictures, to the device."""
        if not batches:
            return
        lane.busy = True
        lane.bulk = any(
            job.size > SMALL for batch in batches for entry in batch for job, _ in entry.places
        )
        for batch in batches:
            self._count(lane, batch)

        def finish(results: list[NDArray[np.float32] | None]) -> None:
            lane.busy = lane.bulk = False
            for batch, embeddings in zip(batches, results, strict=True):
                self._end(batch, embeddings)
            self._advance()

        self._device.submit(lambda: [self._computed(batch) for batch in batches], finish)

    def _end(self, batch: Batch, embeddings: NDArray[np.float32] | None) -> None:
        """Hands out a batch's embeddings, [B, D], or None where the model failed."""
        for entry in batch:
            self._forget(entry)
        if embeddings is None:
            for entry in batch:
                entry.fail("the model failed on the batch with this item")
            return
        for entry, embedding in zip(batch, embeddings, strict=True):
            entry.succeed(embedding)
            self.cache.put(entry.item, embedding, entry.truncated)

    def _count(self, lane: _Lane, batch: Batch) -> None:
        metrics = self.metrics
        metrics.batches += 1
        metrics.batched_items += len(batch)
        metrics.priority_batches += lane is self._express and not lane.bulk
        if _is_of_pictures(batch):
            metrics.images += len(batch)
        else:
            metrics.texts += len(batch)

    @property
    def oom_splits(self) -> int:
        """Batches that the device had no memory for, and that were computed in halves."""
        return self._encode_image.count + self._encode_text.count

    def _computed(self, batch: Batch) -> NDArray[np.float32] | None:
        """A batch's embeddings, [B, D]; None where the model fails. In a thread of the device."""
        contents: list[Any] = [entry.content for entry in batch]
        try:
            if _is_of_pictures(batch):
                encode = partial(self._encode_image, np.stack(contents))
            else:
                encode = partial(self._encode_text, pad(contents, self._tokenizer.spec))
            started = time.perf_counter()
            embeddings = encode()
        except Exception:
            log.exception("a batch of %d failed", len(batch))
            return None
        seconds = time.perf_counter() - started
        self._pace.note(batch, seconds)
        self.metrics.inference_seconds += seconds
        return embeddings


class _Pace:
    """How long the device takes for an item: by the quickest batches of late, since waiting for a
    core has nothing to do with the device."""

    def __init__(self) -> None:
        self._seconds = {False: math.inf, True: math.inf}

    def note(self, batch: Batch, seconds: float) -> None:
        """Takes account of a batch."""
        kind = _is_of_pictures(batch)
        self._seconds[kind] = min(1.1 * self._seconds[kind], seconds / len(batch))

    def expected(self, batch: Batch) -> float:
        """Seconds that a batch will take; endless before the first."""
        return len(batch) * self._seconds[_is_of_pictures(batch)]


def _is_of_pictures(batch: Batch) -> bool:
    return isinstance(batch[0].item, bytes)


def _fingerprint(item: str | bytes) -> Any:
    """What tells two items apart at once; equal for some that are not the same picture.

    Hashing all of a picture would cost the event loop a millisecond."""
    return item if isinstance(item, str) else (len(item), item[-256:])


def _attempt(prepare: Callable[[Any], Any], content: Any) -> Any:
    """What `prepare` gives, or the ItemError that tells why not."""
    try:
        return prepare(content)
    except ItemError as error:
        return error
    except Exception:
        log.exception("an item could not be prepared")
        return ItemError("the server failed to prepare this item")
