"""The engine: takes texts and images of many requests, and computes their embeddings in batches.

    admission -> preprocessing threads -> ready items -> batch -> embeddings

Texts are tokenized and images decoded as soon as they arrive. A batch is formed only when the
device is free ("late binding"), from whatever is ready by then, of all requests together; a device
that computes a batch in next to no time gets several. There is no timer, so an idle engine adds no
delay. Batches alternate between the smallest and the oldest request, so a large one does not keep
a small one waiting, and on a device that runs two batches concurrently a small request does not
wait at all. An item that cannot be encoded fails alone; an item that is already in flight is not
computed twice; what no request waits for any more is not computed.

The engine knows model cards and a runtime; of Jina it knows nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_server.engine.cache import EmbeddingCache, content_key
from clip_server.engine.halving import Halving
from clip_server.engine.metrics import Metrics
from clip_server.engine.residency import Residency
from clip_server.engine.scheduler import (
    FairScheduler,
    PendingItem,
    PendingRequest,
    Queue,
    TextQueue,
    by_size,
)
from clip_server.engine.workers import Workers
from clip_server.errors import ConfigurationError, ItemError, RequestError
from clip_server.model_card import TextSpec
from clip_server.models import tokenizer_files
from clip_server.models.converted import Tower
from clip_server.preprocess.image import ImageTransform
from clip_server.preprocess.tokenizer import pad, tokenizer_for
from clip_server.runtimes.protocol import Runtime, UnloadingRuntime

log = logging.getLogger(__name__)

# A text, an encoded image, or an item already found to be invalid.
Item: TypeAlias = str | bytes | ItemError
# The texts, or the images, of one call to the runtime.
Batch: TypeAlias = list[PendingItem]

# Texts tokenized per task of a thread: about a millisecond of work.
TOKENIZE_CHUNK = 128
# Texts of small requests are tokenized as they arrive if they are ASCII and no longer than this:
# handing them to a thread would cost more than the work, which is a millisecond.
INLINE_TEXTS, INLINE_CHARACTERS = 128, 1024
# Batches of decoded images that may wait for the device: enough to keep it busy, and a bound on
# memory however large a request is.
MAX_DECODED_BATCHES = 4
# Items of a request that counts as small, and may use the priority slot.
SMALL_REQUEST = 4
# Batches are submitted together while the device is expected to take less than this for them:
# handing work to its thread and back takes a third of a millisecond, in which a GPU would idle.
MIN_SUBMISSION_SECONDS = 0.002
MAX_QUEUED_ITEMS = 16_384
# A device is stuck if a batch takes this many times as long as expected; the first batch of its
# kind, of which nothing is known, may take this many times the least bound.
STUCK_TIMES, UNKNOWN_TIMES = 20, 10


@dataclass(frozen=True)
class Encoded:
    """The result of one request.

    embeddings: [N, D] float32; NaN in the rows of items that failed.
    errors: messages by index, for the items that failed.
    truncated_items: indices of the texts longer than the model's context, whose end was dropped.
    tokens: number of tokens that the model read, each text's start and end included.
    preprocess_seconds, queue_seconds, total_seconds: time until the last item was ready for the
        device, from then until it was handed to the device, and from the start until the answer.
    """

    embeddings: NDArray[np.float32]
    errors: dict[int, str]
    truncated_items: list[int]
    tokens: int
    preprocess_seconds: float
    queue_seconds: float
    total_seconds: float


class _DeviceSlot:
    """One of the submissions that the device works on concurrently.

    bulk: whether it holds items of requests that are not small.
    """

    def __init__(self) -> None:
        self.busy = self.bulk = False
        self._started, self._expected_seconds = 0.0, 0.0

    def begin(self, bulk: bool, expected_seconds: float) -> None:
        """Notes that a submission starts. expected_seconds: infinite if nothing is known."""
        self.busy, self.bulk = True, bulk
        self._started, self._expected_seconds = time.monotonic(), expected_seconds

    def is_stuck(self, seconds: float) -> bool:
        """Whether the submission takes more than `seconds`, and far more than expected."""
        if math.isinf(self._expected_seconds):
            allowed = UNKNOWN_TIMES * seconds
        else:
            allowed = max(seconds, STUCK_TIMES * self._expected_seconds)
        return self.busy and time.monotonic() - self._started > allowed


class Engine:
    """Encodes texts and images with a runtime. Use it from one event loop.

    minibatch_size: largest batch for the runtime.
    num_worker_preprocess: threads that tokenize and decode.
    transform: how images are decoded; None: as the model card says, with scaled decoding.
    max_queued_items: further requests are refused while this many items are in flight.
    cache_bytes: size of the embedding cache; 0: no cache.
    max_length: tokens that texts are truncated to; 0, or more than the model's context: to that.
    idle_seconds: a tower that is not used for so long is unloaded, and loaded again when it is
        needed; 0: both stay loaded.
    timed: wraps the function of a stage, such as `encode_texts`, to record its calls.
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
        max_length: int = 0,
        idle_seconds: float = 0,
        timed: Callable[[str, Callable[..., Any]], Callable[..., Any]] = lambda _, call: call,
    ) -> None:
        self.runtime = runtime
        self.card = runtime.card
        self.in_flight_items = 0
        self.cache = EmbeddingCache(cache_bytes)
        self._halvings = Halving(runtime.encode_image), Halving(runtime.encode_text)
        self._encode_image = timed("encode_images", self._halvings[0])
        self._encode_text = timed("encode_texts", self._halvings[1])
        self._minibatch_size = minibatch_size
        self._max_queued_items = max_queued_items
        text = self.card.text
        self._tokenizer = tokenizer_for(tokenizer_files.located(_truncated(text, max_length)))
        self._padding = replace(self._tokenizer.spec, context_length=text.context_length)
        self._tokenize = timed("preprocess_texts", self._tokenizer.tokenize)
        self._transform = timed("preprocess_images", transform or ImageTransform(self.card.image))
        self._preprocess_workers = Workers(num_worker_preprocess, "preprocess")
        # One thread unless the runtime allows two: some frameworks must always be called from the
        # same thread.
        self._device_workers = Workers(2 if runtime.concurrent else 1, "device")
        self._residency: Residency | None = None
        if idle_seconds:
            if not isinstance(runtime, UnloadingRuntime):
                raise ConfigurationError(f"idle_seconds: {runtime.name} cannot unload its towers")
            self._residency = Residency(runtime.towers, idle_seconds)
        self._latency = _LatencyEstimate()
        self._request_numbers = itertools.count()
        self._in_flight: dict[Any, PendingItem] = {}  # by fingerprint
        self._texts, self._images = Queue(), Queue()  # waiting for a preprocessing thread
        self._ready_texts, self._ready_images = TextQueue(), Queue()  # waiting for the device
        self._preprocess_scheduler, self._device_scheduler = FairScheduler(), FairScheduler()
        self._preprocess_tasks = 0
        self._main_slot, self._priority_slot = _DeviceSlot(), _DeviceSlot()
        self.metrics = Metrics(self)

    async def encode(
        self, items: Sequence[Item], *, minibatch_size: int = 0, timeout: float | None = None
    ) -> Encoded:
        """Encodes `items`, in their order. Cancelling drops the items that are not yet computed.

        Images are released once they are decoded, by all callers that keep none of their own.

        minibatch_size: largest batch formed around one of these items; 0, or more than the
            engine's own: the engine's own.
        timeout: seconds after which the request is given up, as if cancelled; None: no timeout.

        Raises:
            RequestError: RESOURCE_EXHAUSTED if too many items are in flight; DEADLINE_EXCEEDED.
        """
        count = len(items)
        self._refuse_if_full(count)
        size = min(minibatch_size or self._minibatch_size, self._minibatch_size)
        request = PendingRequest(next(self._request_numbers), count, self.card.dim, size)
        timer = timeout and asyncio.get_running_loop().call_later(timeout, self._expire, request)
        self.in_flight_items += count
        try:
            if count:
                self.metrics.count_items(items)
                self._admit(request, items)
                del items
                await request.done
                self.metrics.preprocess_seconds.observe(request.preprocess_seconds)
                self.metrics.queue_seconds.observe(request.queue_seconds)
        except asyncio.CancelledError:
            if request.done.cancelled():
                self.metrics.cancelled_requests.inc()
            else:
                request.done.exception()  # it ended in the same moment, and was counted so
            raise
        finally:
            self.in_flight_items -= count
            self.metrics.count_flaws(len(request.errors), len(request.truncated_items))
            if request.is_open():
                self._drop(request)
            if timer:
                timer.cancel()
        return Encoded(
            embeddings=request.embeddings,
            errors=dict(sorted(request.errors.items())),
            truncated_items=sorted(request.truncated_items),
            tokens=request.tokens,
            preprocess_seconds=request.preprocess_seconds,
            queue_seconds=request.queue_seconds,
            total_seconds=time.perf_counter() - request.started,
        )

    @property
    def queued_items(self) -> int:
        """Number of items that wait for a preprocessing thread or for the device."""
        waiting = len(self._texts) + len(self._images)
        return waiting + len(self._ready_texts) + len(self._ready_images)

    @property
    def oom_splits(self) -> int:
        """Number of batches that did not fit into the device's memory and were halved."""
        return sum(halving.splits for halving in self._halvings)

    def is_loaded(self, tower: Tower) -> bool:
        """Whether a tower is in memory."""
        return self._residency is None or self._residency.is_loaded(tower)

    def is_stuck(self, seconds: float) -> bool:
        """Whether the device does not come back from a batch. Any thread may ask.

        seconds: that a batch may take at least; more, if its model is known to be slow.
        """
        return self._main_slot.is_stuck(seconds) or self._priority_slot.is_stuck(seconds)

    def close(self) -> None:
        """Stops the threads, after the work that they have started."""
        self._preprocess_workers.close()
        self._device_workers.close()
        if self._residency:
            self._residency.close()

    def _refuse_if_full(self, count: int) -> None:
        self.metrics.requests.inc()
        in_flight = self.in_flight_items
        # An idle engine accepts any request, even one larger than the bound.
        if in_flight and in_flight + count > self._max_queued_items:
            raise RequestError(
                f"the server is full: {in_flight:,} items are in flight, and it accepts "
                f"{self._max_queued_items:,} at most; try again in a moment",
                "RESOURCE_EXHAUSTED",
                retry_after=1.0,
            )

    def _expire(self, request: PendingRequest) -> None:
        if not request.done.done():
            self.metrics.expired_requests.inc()
            request.done.set_exception(
                RequestError("the request timed out before its answer", "DEADLINE_EXCEEDED")
            )

    def _admit(self, request: PendingRequest, items: Sequence[Item]) -> None:
        for index, item in enumerate(items):
            if isinstance(item, ItemError):
                request.count_prepared()
                request.fail(index, str(item))
            elif (cached := self.cache.get(item)) is not None:
                request.count_prepared()
                request.succeed(index, *cached)
            else:
                self._enqueue(item, request, index)
        self._advance()

    def _enqueue(self, item: str | bytes, request: PendingRequest, index: int) -> None:
        fingerprint = _fingerprint(item)
        pending = self._in_flight.get(fingerprint)
        if pending is not None and pending.is_of(item):
            self.metrics.deduplicated_items.inc()
            pending.add(request, index)
            return
        pending = self._in_flight[fingerprint] = PendingItem(item, fingerprint, request, index)
        if isinstance(item, bytes):
            self._images.push(pending)
        elif self._is_tokenized_inline(item, request):
            pending.content, pending.truncated = self._tokenize(item)
            request.count_prepared()
            self._ready_texts.push(pending)
        else:
            self._texts.push(pending)

    def _is_tokenized_inline(self, text: str, request: PendingRequest) -> bool:
        is_cheap = (
            request.size <= INLINE_TEXTS and len(text) <= INLINE_CHARACTERS and text.isascii()
        )
        return is_cheap and self.is_loaded("text")

    def _drop(self, request: PendingRequest) -> None:
        for queue in (self._texts, self._images, self._ready_texts, self._ready_images):
            for pending in queue.discard(request):
                self._forget(pending)
        self._advance()

    def _forget(self, pending: PendingItem) -> None:
        if self._in_flight.get(pending.fingerprint) is pending:
            del self._in_flight[pending.fingerprint]

    def _advance(self) -> None:
        """Starts all work that can start now; called after every change."""
        while self._preprocess_tasks < self._preprocess_workers.count:
            if self._texts and self._has("text"):  # without a bound: tokens are small
                leader = self._preprocess_scheduler.next(self._texts.requests())
                self._prepare(self._texts, TOKENIZE_CHUNK, leader, self._tokenize)
            elif (
                self._images
                and self._has("image")
                and (request := self._next_to_decode()) is not None
            ):
                self._prepare(self._images, 1, request, self._decode)
            else:
                break
        ready = self._ready_texts or self._ready_images
        if ready and not self._main_slot.busy:
            self._infer(self._main_slot, self._next_batches())
        if ready and self._may_run_concurrently():
            self._infer(self._priority_slot, self._next_concurrent_batch())

    def _has(self, tower: Tower) -> bool:
        """Whether a tower that is needed is loaded. If not, it is being loaded, and items wait."""
        if self._residency is None or self.is_loaded(tower):
            return True

        def finish(is_loaded: bool) -> None:
            if not is_loaded:
                self._fail_waiting(self._images if tower == "image" else self._texts)
            self._advance()

        self._residency.load(tower, finish)
        return False

    def _fail_waiting(self, queue: Queue) -> None:
        while requests := queue.requests():
            for pending in queue.take(self._minibatch_size, next(iter(requests))):
                self._forget(pending)
                pending.fail("the model could not be loaded again")

    def _may_run_concurrently(self) -> bool:
        concurrent = self.runtime.concurrent
        return concurrent and self._main_slot.busy and not self._priority_slot.busy

    def _next_to_decode(self) -> PendingRequest | None:
        """The request whose image is decoded next. Those of small requests are always decoded."""
        requests = self._images.requests()
        if requests and len(self._ready_images) < MAX_DECODED_BATCHES * self._minibatch_size:
            return self._preprocess_scheduler.next(requests)
        smallest = min(requests, key=by_size, default=None)
        return smallest if smallest and smallest.size <= SMALL_REQUEST else None

    def _prepare(
        self, queue: Queue, count: int, leader: PendingRequest, prepare: Callable[[Any], Any]
    ) -> None:
        """Tokenizes or decodes the next items of `queue` in a thread."""
        ready = self._ready_texts if queue is self._texts else self._ready_images
        taken = queue.take(count, leader)
        self._preprocess_tasks += 1

        def finish(contents: list[Any]) -> None:
            self._preprocess_tasks -= 1
            for pending, content in zip(taken, contents, strict=True):
                if isinstance(content, ItemError):
                    pending.fail(str(content))
                elif pending.prepare(*content):
                    ready.push(pending)
                    continue
                self._forget(pending)
            self._advance()

        sources = [pending.source for pending in taken]
        self._preprocess_workers.submit(
            lambda: [_attempt(prepare, each) for each in sources], finish
        )

    def _decode(self, image: bytes) -> tuple[NDArray[np.uint8], bool, bytes]:
        """Pixels, [3, S, S]; False: as with tokens, whether they are truncated; and its key."""
        return self._transform(image), False, content_key(image)

    def _next_batches(self) -> list[Batch]:
        """The next batch, and more while the device is expected to be done in next to no time."""
        batches, seconds = [], 0.0
        while seconds < MIN_SUBMISSION_SECONDS and (self._ready_texts or self._ready_images):
            batches.append(self._next_batch())
            seconds += self._latency.of(batches[-1])
        return batches

    def _next_batch(self) -> Batch:
        texts, images = self._ready_texts, self._ready_images
        leader = self._device_scheduler.next([*texts.requests(), *images.requests()])
        queue = texts if leader in texts.requests() else images
        return queue.take(leader.minibatch_size, leader)

    def _next_concurrent_batch(self) -> list[Batch]:
        """The batch to run concurrently with the main slot's, if any: a full one where the runtime
        copies it while the first is computed, else a small request during a bulk one."""
        ready = max(len(self._ready_texts), len(self._ready_images))
        if self.runtime.overlaps and ready >= self._minibatch_size:
            return [self._next_batch()]
        small = self._next_small_batch() if self._main_slot.bulk else []
        return [small] if small else []

    def _next_small_batch(self) -> Batch:
        """The ready items of the smallest request, if it is a small one."""
        texts, images = self._ready_texts, self._ready_images
        request = min([*texts.requests(), *images.requests()], key=by_size, default=None)
        if request is None or request.size > SMALL_REQUEST:
            return []
        return texts.take_from(request, SMALL_REQUEST) or images.take_from(request, SMALL_REQUEST)

    def _infer(self, slot: _DeviceSlot, batches: list[Batch]) -> None:
        """Submits batches, each of texts or of images, to the device."""
        if not batches:
            return
        bulk = any(map(_is_bulk, itertools.chain.from_iterable(batches)))
        slot.begin(bulk, sum(map(self._latency.of, batches)))
        for batch in batches:
            self._count_batch(slot, batch)

        def finish(results: list[tuple[NDArray[np.float32] | None, float]]) -> None:
            slot.busy = slot.bulk = False
            for batch, result in zip(batches, results, strict=True):
                self._finish_batch(batch, *result)
            self._advance()

        self._device_workers.submit(lambda: [self._compute(batch) for batch in batches], finish)

    def _compute(self, batch: Batch) -> tuple[NDArray[np.float32] | None, float]:
        """Computes a batch's embeddings, [B, D], in a device thread; None if the model fails.

        Returns them with the seconds that it took."""
        contents: list[Any] = [pending.content for pending in batch]
        try:
            if batch[0].is_image:
                encode = partial(self._encode_image, np.stack(contents))
            else:
                encode = partial(self._encode_text, pad(contents, self._padding))
            started = time.perf_counter()
            embeddings: NDArray[np.float32] = encode()
        except Exception:
            log.exception(
                "a batch of %d failed", len(batch), extra={"request_id": _request_ids(batch)}
            )
            return None, 0.0
        seconds = time.perf_counter() - started
        self._latency.record(batch, seconds)
        return embeddings, seconds

    def _finish_batch(
        self, batch: Batch, embeddings: NDArray[np.float32] | None, seconds: float
    ) -> None:
        """Hands out a batch's embeddings, [B, D], which took some seconds, or an error where the
        model failed."""
        for pending in batch:
            self._forget(pending)
        if embeddings is None:
            for pending in batch:
                pending.fail("the model failed on the batch with this item")
            return
        self.metrics.observe_computed(len(batch), seconds, is_image=batch[0].is_image)
        for pending, embedding in zip(batch, embeddings, strict=True):
            pending.succeed(embedding)
            if self.cache.max_bytes:
                self.cache.put(pending.key, embedding, pending.truncated, pending.tokens)

    def _count_batch(self, slot: _DeviceSlot, batch: Batch) -> None:
        now = time.perf_counter()
        for pending in batch:
            for request, _ in pending.recipients:
                request.submitted = now
        self.metrics.observe_batch(len(batch), is_image=batch[0].is_image)
        if slot is self._priority_slot and not slot.bulk:
            self.metrics.priority_batches.inc()


class _LatencyEstimate:
    """Estimates seconds per item, separately for texts and images, from the fastest recent batches:
    slower ones waited for a core."""

    def __init__(self) -> None:
        self._seconds = {False: math.inf, True: math.inf}

    def record(self, batch: Batch, seconds: float) -> None:
        """Takes a computed batch into account."""
        kind = batch[0].is_image
        self._seconds[kind] = min(1.1 * self._seconds[kind], seconds / len(batch))

    def of(self, batch: Batch) -> float:
        """Seconds that a batch is expected to take; infinite before the first of its kind."""
        return len(batch) * self._seconds[batch[0].is_image]


def _truncated(spec: TextSpec, max_length: int) -> TextSpec:
    """`spec` with a context of `max_length` tokens, if that is shorter; 0: as it is."""
    return replace(spec, context_length=min(max_length or spec.context_length, spec.context_length))


def _request_ids(batch: Batch) -> str:
    ids = {each.request_id: None for pending in batch for each in pending.requests()}
    return ", ".join(filter(None, ids))


def _is_bulk(pending: PendingItem) -> bool:
    return any(request.size > SMALL_REQUEST for request, _ in pending.recipients)


def _fingerprint(item: str | bytes) -> Any:
    """A cheap key for deduplication; different images may share one.

    Hashing a whole image would block the event loop for a millisecond."""
    return item if isinstance(item, str) else (len(item), item[-256:])


def _attempt(prepare: Callable[[Any], Any], source: Any) -> Any:
    """The result of `prepare`, or the ItemError that it raised."""
    try:
        return prepare(source)
    except ItemError as error:
        return error
    except Exception:
        log.exception("an item could not be prepared")
        return ItemError("the server failed to prepare this item")
