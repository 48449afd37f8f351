"""The engine: texts and images in, embeddings out, one batch at a time.

    admission -> preprocessing pool -> ready entries -> batch -> embeddings

Texts are tokenized and pictures decoded as soon as they arrive. A batch is formed only when
the device is free ("late binding"): whatever is ready by then, of all requests together, goes
into it. There is no timer, so an idle engine adds no wait. Jobs take turns, so a large one
does not keep a small one waiting. An item that cannot be encoded fails alone.

The engine knows model cards and a runtime; of Jina it knows nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from clip_server.errors import ItemError
from clip_server.models.image import ImageTransform
from clip_server.models.tokenizer import Tokenizer, pad
from clip_server.runtimes.base import Runtime

log = logging.getLogger(__name__)

# A text, an encoded picture, or an item already found unfit.
Item: TypeAlias = str | bytes | ItemError

# Texts tokenized in one call to the pool: about a millisecond of work.
TOKENIZE_CHUNK = 64
# Batches' worth of ready texts among which like lengths are looked for.
LENGTH_WINDOW = 8
# Tokens of padding that cost less than a batch of their own.
SHORT = 8
# Batches' worth of decoded pictures that may wait for the device: enough to keep it busy, and
# a bound on memory however large a request is.
DECODED_AHEAD = 4


@dataclass(frozen=True)
class Encoded:
    """What became of a request's items.

    embeddings: [N, D]; the row of an item that failed is NaN.
    errors: why, by the item's index.
    preprocess_seconds, total_seconds: until the last item was ready for the device, and
        until the answer.
    """

    embeddings: NDArray[np.float32]
    errors: dict[int, str]
    preprocess_seconds: float
    total_seconds: float


@dataclass(eq=False)
class _Job:
    """One request under way."""

    embeddings: NDArray[np.float32]
    minibatch_size: int
    done: asyncio.Future[None]
    open_items: int
    unprepared_items: int
    errors: dict[int, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    prepared: float = 0.0

    def close_preparation(self) -> None:
        self.unprepared_items -= 1
        if not self.unprepared_items:
            self.prepared = time.perf_counter()

    def fail(self, index: int, message: str) -> None:
        self.errors[index] = message
        self._close_item()

    def succeed(self, index: int, embedding: NDArray[np.float32]) -> None:
        self.embeddings[index] = embedding
        self._close_item()

    def _close_item(self) -> None:
        self.open_items -= 1
        if not self.open_items and not self.done.done():
            self.done.set_result(None)


@dataclass(frozen=True, eq=False)
class _Entry:
    """An item between two stages: its content so far, and where its embedding goes."""

    job: _Job
    index: int
    content: Any


class _FairQueue:
    """Entries of many jobs, taken from each in turn."""

    def __init__(self) -> None:
        self._jobs: dict[_Job, deque[_Entry]] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, entry: _Entry) -> None:
        self._jobs.setdefault(entry.job, deque()).append(entry)
        self._length += 1

    def discard(self, job: _Job) -> None:
        self._length -= len(self._jobs.pop(job, ()))

    def end_turn(self, job: _Job) -> None:
        """Puts a job at the end of the line."""
        if job in self._jobs:
            self._jobs[job] = self._jobs.pop(job)

    def take(self, count: int) -> list[_Entry]:
        """Up to `count` entries, one of each job in turn."""
        taken: list[_Entry] = []
        while self._jobs and len(taken) < count:
            job = next(iter(self._jobs))
            entries = self._jobs.pop(job)
            taken.append(entries.popleft())
            if entries:  # to the end of the line
                self._jobs[job] = entries
        self._length -= len(taken)
        return taken


class Engine:
    """Encodes texts and images with a runtime. Use it from one event loop.

    minibatch_size: items the runtime takes at once, at most.
    num_worker_preprocess: threads that tokenize and decode.
    transform: how pictures are decoded; None: the card's own way with scaled decoding.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        minibatch_size: int = 32,
        num_worker_preprocess: int = 4,
        transform: ImageTransform | None = None,
    ) -> None:
        self.runtime = runtime
        self.card = runtime.card
        self._minibatch_size = minibatch_size
        self._tokenizer = Tokenizer(self.card.text)
        self._transform = transform or ImageTransform(self.card.image)
        self._workers = num_worker_preprocess
        self._pool = ThreadPoolExecutor(num_worker_preprocess, "preprocess")
        self._device = ThreadPoolExecutor(1, "device")
        self._texts = _FairQueue()  # waiting for the pool
        self._pictures = _FairQueue()
        self._ready_texts = _FairQueue()  # waiting for the device
        self._ready_pictures = _FairQueue()
        self._preparing = 0
        self._device_busy = False
        self._pictures_turn = False

    async def encode(self, items: Sequence[Item], *, minibatch_size: int = 0) -> Encoded:
        """Embeddings of `items`, in their order. Cancelling drops what has not been begun.

        minibatch_size: a batch led by one of these holds at most so many; 0, or more than the
            engine's own: the engine's own.
        """
        job = _Job(
            embeddings=np.full((len(items), self.card.dim), np.nan, np.float32),
            minibatch_size=min(minibatch_size or self._minibatch_size, self._minibatch_size),
            done=asyncio.get_running_loop().create_future(),
            open_items=len(items),
            unprepared_items=len(items),
        )
        if items:
            self._admit(job, items)
            try:
                await job.done
            except asyncio.CancelledError:
                self._drop(job)
                raise
        return Encoded(
            embeddings=job.embeddings,
            errors=dict(sorted(job.errors.items())),
            preprocess_seconds=max(0.0, job.prepared - job.started),
            total_seconds=time.perf_counter() - job.started,
        )

    def close(self) -> None:
        """Ends the threads, after what they have begun."""
        self._pool.shutdown(cancel_futures=True)
        self._device.shutdown(cancel_futures=True)

    def _admit(self, job: _Job, items: Sequence[Item]) -> None:
        for index, item in enumerate(items):
            entry = _Entry(job, index, item)
            if isinstance(item, ItemError):
                self._reject(entry, str(item))
            elif isinstance(item, str):
                self._texts.push(entry)
            else:
                self._pictures.push(entry)
        self._advance()

    def _drop(self, job: _Job) -> None:
        for queue in (self._texts, self._pictures, self._ready_texts, self._ready_pictures):
            queue.discard(job)
        self._advance()

    @staticmethod
    def _reject(entry: _Entry, message: str) -> None:
        entry.job.close_preparation()
        entry.job.fail(entry.index, message)

    def _advance(self) -> None:
        """Starts whatever can be started now; called after every change."""
        pictures_ahead = DECODED_AHEAD * self._minibatch_size
        while self._preparing < self._workers:
            if self._texts:  # all of them: tokens are small, and a late one is not held up
                self._prepare(self._texts, TOKENIZE_CHUNK, self._tokenizer.encode)
            elif self._pictures and len(self._ready_pictures) < pictures_ahead:
                self._prepare(self._pictures, 1, self._transform)
            else:
                break
        if not self._device_busy and (self._ready_texts or self._ready_pictures):
            self._infer()

    def _prepare(self, queue: _FairQueue, count: int, prepare: Callable[[Any], Any]) -> None:
        """Tokenizes or decodes the next entries of `queue` in the pool."""
        ready = self._ready_texts if queue is self._texts else self._ready_pictures
        entries = queue.take(count)
        self._preparing += 1

        def finish(future: asyncio.Future[list[Any]]) -> None:
            self._preparing -= 1
            for entry, content in zip(entries, future.result(), strict=True):
                if isinstance(content, ItemError):
                    self._reject(entry, str(content))
                elif not entry.job.done.cancelled():
                    entry.job.close_preparation()
                    ready.push(_Entry(entry.job, entry.index, content))
            self._advance()

        contents = [entry.content for entry in entries]
        self._run(self._pool, lambda: [_attempt(prepare, c) for c in contents], finish)

    def _infer(self) -> None:
        """Forms the next batch and gives it to the device."""
        pictures = self._ready_pictures and (self._pictures_turn or not self._ready_texts)
        self._pictures_turn = not pictures  # taking turns while both are ready
        entries = self._next_pictures() if pictures else self._next_texts()
        encode = self._encode_pictures if pictures else self._encode_texts
        self._device_busy = True

        def finish(future: asyncio.Future[NDArray[np.float32]]) -> None:
            self._device_busy = False
            error = future.exception()
            if error is not None:
                log.error("a batch of %d failed", len(entries), exc_info=error)
            for row, entry in enumerate(entries):
                if error is None:
                    entry.job.succeed(entry.index, future.result()[row])
                else:
                    entry.job.fail(entry.index, "the model failed on the batch with this item")
            self._advance()

        self._run(self._device, lambda: encode([entry.content for entry in entries]), finish)

    @staticmethod
    def _run(
        pool: ThreadPoolExecutor,
        work: Callable[[], Any],
        finish: Callable[[asyncio.Future[Any]], None],
    ) -> None:
        asyncio.get_running_loop().run_in_executor(pool, work).add_done_callback(finish)

    def _next_pictures(self) -> list[_Entry]:
        first = self._ready_pictures.take(1)
        return first + self._ready_pictures.take(first[0].job.minibatch_size - 1)

    def _next_texts(self) -> list[_Entry]:
        """The text whose turn it is, with those of like lengths: a batch is as long as its
        longest text, so unlike ones would pay for each other's padding."""
        window = self._ready_texts.take(LENGTH_WINDOW * self._minibatch_size)
        first = window[0]
        length = len(first.content)
        by_likeness = sorted(window, key=lambda entry: abs(len(entry.content) - length))
        batch = [
            entry
            for entry in by_likeness[: first.job.minibatch_size]
            if _are_alike(len(entry.content), length)
        ]
        chosen = set(map(id, batch))
        for entry in window:
            if id(entry) not in chosen:
                self._ready_texts.push(entry)
        self._ready_texts.end_turn(first.job)
        return batch

    def _encode_pictures(self, pixels: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        return self.runtime.encode_image(np.stack(pixels))

    def _encode_texts(self, tokens: list[NDArray[np.int32]]) -> NDArray[np.float32]:
        return self.runtime.encode_text(pad(tokens, self.card.text))


def _are_alike(a: int, b: int) -> bool:
    """Whether two lengths belong in one batch: a batch more costs less than such padding."""
    return max(a, b) <= 2 * min(a, b) + SHORT


def _attempt(prepare: Callable[[Any], Any], content: Any) -> Any:
    """What `prepare` gives, or the ItemError that tells why not."""
    try:
        return prepare(content)
    except ItemError as error:
        return error
    except Exception:
        log.exception("an item could not be prepared")
        return ItemError("the server failed to prepare this item")
