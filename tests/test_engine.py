"""The engine by itself, over a runtime that only counts."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
from conftest import saved
from numpy.typing import NDArray
from PIL import Image

from clip_server.engine.engine import Engine
from clip_server.errors import ItemError, RequestError
from clip_server.models import zoo
from clip_server.preprocess.tokenizer import tokenizer_for


class CountingRuntime:
    """Embeds a text as the sum of its tokens, an image as its mean; keeps the shapes it was given.

    seconds: that a batch takes, by `clock`: no test waits for it, and a busy machine adds nothing.
    fails: no image can be encoded.
    held: a batch waits until the test lets it go; so a test need not know how fast the machine is.
    """

    name, device, precision = "counting", "cpu", "fp32"

    def __init__(
        self, seconds: float = 0.0, concurrent: bool = False, overlaps: bool = False
    ) -> None:
        self.card = zoo.resolve("embedded")
        self.seconds, self.concurrent, self.overlaps = seconds, concurrent, overlaps
        self.clock = 0.0
        self.inside = self.most_inside = 0  # calls at the same time
        self.texts: list[tuple[int, ...]] = []
        self.images: list[tuple[int, ...]] = []
        self.held = False
        self.fails = False
        self._waiting = 0
        self._gate = threading.Semaphore(0)

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        self.inside += 1
        self.most_inside = max(self.inside, self.most_inside)
        self._take_time()
        self.inside -= 1
        self.texts.append(tokens.shape)
        return self._rows(tokens.sum(1))

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if self.fails:
            raise RuntimeError("CUDA out of memory at 0x7f")
        self._take_time()
        self.images.append(pixels.shape)
        return self._rows(pixels.mean((1, 2, 3)))

    def now(self) -> float:
        return self.clock

    async def batch_waits(self) -> None:
        """Returns when the device has a batch that is held."""
        while not self._waiting:
            await asyncio.sleep(0.001)

    def let_one_go(self) -> None:
        self._waiting -= 1
        self._gate.release()

    def let_all_go(self) -> None:
        self.held = False
        self._gate.release(1000)  # one may be about to wait

    async def batches_until(self, task: asyncio.Task[Any]) -> int:
        """How many batches go through the device until `task` is done, the held one included."""
        count = 0
        while not task.done():
            if self._waiting:
                self.let_one_go()
                count += 1
            await asyncio.sleep(0.001)
        return count

    def _take_time(self) -> None:
        if self.held:
            self._waiting += 1
            self._gate.acquire()
        self.clock += self.seconds

    def _rows(self, values: NDArray[Any]) -> NDArray[np.float32]:
        return np.repeat(values[:, None], self.card.dim, 1).astype(np.float32)


def image(grey: int) -> bytes:
    return saved(Image.new("RGB", (64, 64), (grey, grey, grey)), "PNG")


def counted(engine: Engine, name: str) -> float | None:
    return engine.metrics.registry.get_sample_value(f"clip_{name}_total")


def run(
    work: Callable[[Engine, CountingRuntime], Any],
    seconds: float = 0.0,
    concurrent: bool = False,
    overlaps: bool = False,
    **options: Any,
) -> Any:
    async def main() -> Any:
        runtime = CountingRuntime(seconds, concurrent, overlaps)
        engine = Engine(runtime, **options)
        with mock.patch("time.perf_counter", runtime.now):
            try:
                return await asyncio.wait_for(work(engine, runtime), 60)
            finally:
                runtime.let_all_go()
                engine.close()

    return asyncio.run(main())


def test_order_and_errors() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        tokenizer = tokenizer_for(runtime.card.text)
        items = [image(i) if i % 3 else f"text {i}" for i in range(90)]
        items[7] = b"nonsense"
        items[8] = ItemError("found unfit before")
        encoded = await engine.encode(items)
        assert set(encoded.errors) == {7, 8}
        assert encoded.errors[8] == "found unfit before"
        for i, row in enumerate(encoded.embeddings):
            if i in encoded.errors:
                assert np.isnan(row).all()
            else:
                expected = i if i % 3 else tokenizer.encode(f"text {i}").sum()
                assert row[0] == expected
        assert 0 <= encoded.preprocess_seconds <= encoded.total_seconds
        assert encoded.total_seconds == len(runtime.texts) + len(runtime.images)

    run(work, seconds=1, minibatch_size=16)


def test_nothing_to_encode() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        assert (await engine.encode([])).embeddings.shape == (0, runtime.card.dim)
        only_bad = await engine.encode([ItemError("a"), b""])
        assert len(only_bad.errors) == 2

    run(work)


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, 8), (0.01, 1)])
def test_what_is_handed_over_together(seconds: float, expected: int) -> None:
    """A device that takes no time for a batch gets many, so that it need not wait for a busy event
    loop; a slow one gets the next batch when it is free."""

    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        await engine.encode(numbered(640))  # shows how long a batch takes
        before = len(runtime.texts)
        task = asyncio.create_task(engine.encode(numbered(128, "more")))
        await asyncio.sleep(0)  # it is admitted
        end = time.monotonic() + 60
        while len(runtime.texts) - before < expected and time.monotonic() < end:
            time.sleep(0.01)  # the event loop is busy
        time.sleep(0.05)  # for one too many to show
        assert len(runtime.texts) - before == expected
        assert not (await task).errors

    run(work, seconds, minibatch_size=16)


def test_requests_share_batches_and_none_is_too_large() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        tasks = [asyncio.create_task(engine.encode([f"text {i}"])) for i in range(256)]
        await runtime.batch_waits()
        await all_ready(engine)
        runtime.let_all_go()
        await asyncio.gather(*tasks)
        sizes = [shape[0] for shape in runtime.texts]
        assert sum(sizes) == 256
        assert max(sizes) <= 32
        # While the first runs, all others become ready and share full ones.
        assert len(sizes) <= 20
        assert max(sizes[1:-1]) == min(sizes[1:-1]) == 32

    run(work)


def test_a_request_may_ask_for_smaller_batches() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        await engine.encode([f"text {i}" for i in range(20)], minibatch_size=4)
        assert max(shape[0] for shape in runtime.texts) == 4
        runtime.texts.clear()
        await engine.encode([f"text {i}" for i in range(200)], minibatch_size=100)
        assert max(shape[0] for shape in runtime.texts) == 8

    run(work, seconds=0.01, minibatch_size=8)


def test_like_lengths_go_together() -> None:
    """Each batch is as long as its longest text: long ones do not hold short ones up."""

    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        texts = [f"{i} " + "word " * 60 if i % 4 == 0 else f"{i}" for i in range(128)]
        task = asyncio.create_task(engine.encode(texts))
        await runtime.batch_waits()
        await all_ready(engine)
        runtime.let_all_go()
        assert not (await task).errors
        positions = sum(rows * length for rows, length in runtime.texts)
        padded = 128 * 62
        assert positions < 0.5 * padded

    run(work)


def numbered(count: int, word: str = "number") -> list[str]:
    return [f"{word} {i}" for i in range(count)]


async def all_ready(engine: Engine) -> None:
    """Returns when whatever has been admitted waits for the device."""
    while engine._texts or engine._images or engine._preprocess_tasks:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("requests", [1, 40])
def test_a_small_request_does_not_wait_for_large_ones(requests: int) -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        large = [
            asyncio.create_task(engine.encode(numbered(4000 // requests, f"bulk {i}")))
            for i in range(requests)
        ]
        await runtime.batch_waits()
        await all_ready(engine)
        quick = asyncio.create_task(engine.encode(["quick"]))
        # The one in flight, perhaps one of the oldest's, and its own.
        assert await runtime.batches_until(quick) <= 3
        assert not any(task.done() for task in large)
        runtime.let_all_go()
        await asyncio.gather(*large)

    run(work, seconds=0.005)


def test_the_oldest_request_does_not_wait_for_small_ones_for_ever() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        large = asyncio.create_task(engine.encode(["word " * 50 + str(i) for i in range(200)]))
        await runtime.batch_waits()
        await all_ready(engine)
        for i in range(1000):
            small = [asyncio.create_task(engine.encode([f"{i} {k}"])) for k in range(3)]
            await all_ready(engine)
            for each in small:
                await runtime.batches_until(each)
            if large.done():
                return
        pytest.fail("only small requests were served")

    run(work, seconds=0.005)


def test_a_concurrent_device_runs_a_small_request_during_a_bulk_one() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        large = asyncio.create_task(engine.encode([image(i) for i in range(64)]))
        await runtime.batch_waits()
        runtime.held = False
        quick = await engine.encode(["quick", image(77)])
        assert not quick.errors
        assert counted(engine, "priority_batches") == 2
        assert [shape[0] for shape in runtime.images] == [1]  # the large one's batch is held yet
        assert not large.done()
        runtime.let_all_go()
        assert not (await large).errors

    run(work, concurrent=True)


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_next_full_batch_is_copied_while_one_is_computed(overlaps: bool) -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        task = asyncio.create_task(engine.encode(numbered(26)))
        await runtime.batch_waits()
        await all_ready(engine)
        while overlaps and runtime.inside < 2:
            await asyncio.sleep(0.001)
        runtime.let_all_go()
        assert not (await task).errors
        assert runtime.most_inside == (2 if overlaps else 1)
        assert sorted(shape[0] for shape in runtime.texts) == [2, 8, 8, 8]
        assert counted(engine, "priority_batches") == 0

    run(work, concurrent=True, overlaps=overlaps, minibatch_size=8)


def test_what_is_in_flight_is_not_computed_again() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        same = [*numbered(40), *numbered(40), image(3), image(3)]
        runtime.held = True
        tasks = [asyncio.create_task(engine.encode(same)) for _ in range(5)]
        await runtime.batch_waits()
        runtime.let_all_go()
        results = await asyncio.gather(*tasks)
        assert sum(shape[0] for shape in runtime.texts) == 40
        assert sum(shape[0] for shape in runtime.images) == 1
        assert counted(engine, "deduplicated_items") == 5 * len(same) - 41
        for result in results:
            assert np.array_equal(result.embeddings, results[0].embeddings)
            assert np.array_equal(result.embeddings[:40], result.embeddings[40:80])
        # Different images of the same length and with the same end.
        first, second = image(10), image(11)
        encoded = await engine.encode([first + b"0" * 300, second + b"0" * 300])
        assert encoded.embeddings[0][0] == 10
        assert encoded.embeddings[1][0] == 11

    run(work)


def test_an_image_that_is_decoded_is_known_without_its_bytes() -> None:
    """While it waits for the device, only its pixels are in memory."""

    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        # Of the same length and with the same end.
        first, second = image(10) + b"0" * 300, image(11) + b"0" * 300
        kept = sys.getrefcount(first)
        tasks = [asyncio.create_task(engine.encode([first]))]
        await runtime.batch_waits()
        while sys.getrefcount(first) > kept:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(engine.encode([each])) for each in (first, second)]
        runtime.let_all_go()
        results = await asyncio.gather(*tasks)
        assert [result.embeddings[0][0] for result in results] == [10, 10, 11]

    run(work)


def test_a_shared_item_outlives_the_request_that_came_first() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        texts = numbered(200)
        first = asyncio.create_task(engine.encode(texts))
        second = asyncio.create_task(engine.encode(texts[150:]))
        await runtime.batch_waits()
        await all_ready(engine)
        first.cancel()
        await asyncio.wait([first])
        runtime.let_all_go()
        encoded = await second
        assert not encoded.errors
        assert np.isfinite(encoded.embeddings).all()
        computed = sum(shape[0] for shape in runtime.texts)
        assert computed <= 32 + 50
        assert not engine._in_flight

    run(work)


def test_a_small_request_does_not_wait_in_the_line_of_the_same_item() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        large = asyncio.create_task(engine.encode(numbered(4000)))
        await runtime.batch_waits()
        await all_ready(engine)
        small = asyncio.create_task(engine.encode(["number 3999"]))
        assert await runtime.batches_until(small) <= 3
        runtime.let_all_go()
        assert not (await large).errors
        assert sum(shape[0] for shape in runtime.texts) == 4000

    run(work, seconds=0.005)


def test_a_bad_item_that_is_shared_fails_everywhere() -> None:
    async def work(engine: Engine, _: CountingRuntime) -> None:
        results = await asyncio.gather(*(engine.encode([b"nonsense", "good"]) for _ in range(3)))
        assert all(set(result.errors) == {0} for result in results)

    run(work)


def test_what_is_too_late_is_given_up() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        with pytest.raises(RequestError, match="timed out") as raised:
            await engine.encode(numbered(4000), timeout=2)
        assert raised.value.code == "DEADLINE_EXCEEDED"
        await runtime.batch_waits()
        runtime.let_all_go()
        assert not (await engine.encode(["next"], timeout=60)).errors
        assert [shape[0] for shape in runtime.texts] == [32, 1]
        assert counted(engine, "expired_requests") == 1
        assert engine.in_flight_items == 0

    run(work)


def test_what_is_too_much_is_refused() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        # An idle engine takes any request.
        in_flight = asyncio.create_task(engine.encode(numbered(150)))
        await runtime.batch_waits()
        with pytest.raises(RequestError, match="server is full: 150 items") as raised:
            await engine.encode(["one more"])
        assert raised.value.code == "RESOURCE_EXHAUSTED"
        assert raised.value.retry_after > 0
        runtime.let_all_go()
        assert not (await in_flight).errors
        assert not (await engine.encode(["one more"])).errors

    run(work, max_queued_items=100)


def test_cache() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        items = [*numbered(20), image(5)]
        first = await engine.encode(items)
        again = await engine.encode(items)
        assert np.array_equal(first.embeddings, again.embeddings)
        assert sum(shape[0] for shape in runtime.texts) == 20
        assert (engine.cache.hits, engine.cache.misses) == (21, 21)
        await engine.encode(numbered(1000, "other"))
        assert 0 < engine.cache.bytes <= engine.cache.max_bytes
        # The least recently used is gone.
        await engine.encode(["number 0"])
        assert engine.cache.hits == 21

    run(work, cache_bytes=100_000)


@pytest.mark.parametrize("cache_bytes", [0, 100_000])
def test_truncated_texts_are_counted(cache_bytes: int) -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        del runtime
        fits, long = "cat " * 75, "cat " * 76
        items = [fits, long, image(5), long, f"{long} \u732b", ItemError("unfit")]
        for _ in range(2):  # the second time from the cache, if there is one
            assert (await engine.encode(items)).truncated_items == [1, 3, 4]
        assert counted(engine, "truncated_texts") == 6

    run(work, cache_bytes=cache_bytes)


def test_no_cache_unless_asked_for() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        await engine.encode(["text"])
        await engine.encode(["text"])
        assert len(runtime.texts) == 2
        assert engine.cache.bytes == 0

    run(work)


def test_what_is_cancelled_is_not_computed() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        task = asyncio.create_task(engine.encode(numbered(4000)))
        await runtime.batch_waits()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runtime.let_all_go()
        encoded = await engine.encode(["next"])
        assert not encoded.errors
        assert [shape[0] for shape in runtime.texts] == [32, 1]

    run(work)


def test_decoded_images_waiting_are_bounded() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.held = True
        task = asyncio.create_task(engine.encode([image(i % 256) for i in range(256)]))
        await runtime.batch_waits()
        while engine._preprocess_tasks:
            await asyncio.sleep(0.001)
        assert 0 < len(engine._ready_images) <= 4 * 8 + 4
        assert engine._images
        runtime.let_all_go()
        assert not (await task).errors

    run(work, minibatch_size=8)


def test_a_runtime_that_fails() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        runtime.fails = True
        encoded = await engine.encode([image(1), "text", image(2)])
        assert set(encoded.errors) == {0, 2}
        assert "0x7f" not in encoded.errors[0]
        assert np.isfinite(encoded.embeddings[1]).all()

    run(work)
