"""The engine by itself, over a runtime that only counts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clip_server.engine import Engine
from clip_server.errors import ItemError
from clip_server.models import zoo
from clip_server.models.tokenizer import Tokenizer


class CountingRuntime:
    """Embeds a text as its tokens' sum, a picture as its mean; keeps the shapes it was given."""

    name, device, dtype = "counting", "cpu", "fp32"

    def __init__(self, seconds: float = 0.0) -> None:
        self.card = zoo.resolve("embedded")
        self.seconds = seconds
        self.texts: list[tuple[int, ...]] = []
        self.images: list[tuple[int, ...]] = []

    def encode_text(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        time.sleep(self.seconds)
        self.texts.append(tokens.shape)
        return self._rows(tokens.sum(1))

    def encode_image(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        time.sleep(self.seconds)
        self.images.append(pixels.shape)
        return self._rows(pixels.mean((1, 2, 3)))

    def _rows(self, values: NDArray[Any]) -> NDArray[np.float32]:
        return np.repeat(values[:, None], self.card.dim, 1).astype(np.float32)


def picture(grey: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (64, 64), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def run(
    work: Callable[[Engine, CountingRuntime], Any], seconds: float = 0.0, **options: Any
) -> Any:
    async def main() -> Any:
        runtime = CountingRuntime(seconds)
        engine = Engine(runtime, **options)
        try:
            return await asyncio.wait_for(work(engine, runtime), 60)
        finally:
            engine.close()

    return asyncio.run(main())


def test_order_and_errors() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        tokenizer = Tokenizer(runtime.card.text)
        items = [picture(i) if i % 3 else f"text {i}" for i in range(90)]
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

    run(work, minibatch_size=16)


def test_nothing_to_encode() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        assert (await engine.encode([])).embeddings.shape == (0, runtime.card.dim)
        only_bad = await engine.encode([ItemError("a"), b""])
        assert len(only_bad.errors) == 2

    run(work)


def test_requests_share_batches_and_none_is_too_large() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        await asyncio.gather(*(engine.encode([f"text {i}"]) for i in range(256)))
        sizes = [shape[0] for shape in runtime.texts]
        assert sum(sizes) == 256
        assert max(sizes) <= 32
        # While the first small batches run, all others become ready and share full ones.
        assert len(sizes) <= 20

    run(work, seconds=0.02)


def test_a_request_may_ask_for_smaller_batches() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        await engine.encode(["text"] * 20, minibatch_size=4)
        assert max(shape[0] for shape in runtime.texts) == 4
        runtime.texts.clear()
        await engine.encode(["text"] * 200, minibatch_size=100)
        assert max(shape[0] for shape in runtime.texts) == 8

    run(work, seconds=0.01, minibatch_size=8)


def test_like_lengths_go_together() -> None:
    """Each batch is as long as its longest text: long ones do not hold short ones up."""

    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        texts = ["word " * 60 if i % 4 == 0 else "word" for i in range(128)]
        await engine.encode(texts)
        positions = sum(rows * length for rows, length in runtime.texts)
        padded = 128 * 62
        assert positions < 0.5 * padded

    run(work, seconds=0.02)


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        large = asyncio.create_task(engine.encode([f"number {i}" for i in range(4000)]))
        await asyncio.sleep(0.2)
        before = len(runtime.texts)
        await engine.encode(["quick"])
        assert len(runtime.texts) - before <= 3  # the one under way, its own, one to spare
        assert not large.done()
        await large

    run(work, seconds=0.02)


def test_what_is_cancelled_is_not_computed() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        task = asyncio.create_task(engine.encode([f"number {i}" for i in range(4000)]))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        begun = len(runtime.texts)
        encoded = await engine.encode(["next"])
        assert not encoded.errors
        assert len(runtime.texts) <= begun + 3

    run(work, seconds=0.02)


def test_decoded_pictures_waiting_are_bounded() -> None:
    async def work(engine: Engine, _: CountingRuntime) -> None:
        most = 0
        task = asyncio.create_task(engine.encode([picture(i % 256) for i in range(400)]))
        while not task.done():
            most = max(most, len(engine._ready_pictures))
            await asyncio.sleep(0.001)
        assert not (await task).errors
        assert 0 < most <= 4 * 8 + 4

    run(work, seconds=0.03, minibatch_size=8)


def test_a_runtime_that_fails() -> None:
    async def work(engine: Engine, runtime: CountingRuntime) -> None:
        def fail(_: NDArray[np.uint8]) -> NDArray[np.float32]:
            raise RuntimeError("CUDA out of memory at 0x7f")

        runtime.encode_image = fail  # type: ignore[method-assign]
        encoded = await engine.encode([picture(1), "text", picture(2)])
        assert set(encoded.errors) == {0, 2}
        assert "0x7f" not in encoded.errors[0]
        assert np.isfinite(encoded.embeddings[1]).all()

    run(work)
