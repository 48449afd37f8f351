"""The base of the drivers: commands in and answers out as lines of JSON, texts, photos, clocks.

A driver is a process of its own, in the environment of the client that it drives. It needs
numpy and nothing of this project. Each command is an object with `op` and its arguments.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Item = str | bytes

# fmt: off
WHAT = ["a", "one", "the", "some", "another", "this", "that", "every"]
LIKE = [
    "small", "large", "red", "blue", "old", "new", "bright", "dark", "wooden", "quiet", "wet",
    "dusty", "striped", "happy", "tired", "broken", "golden", "empty", "crowded", "black and white",
]
THING = [
    "dog", "cat", "car", "bicycle", "train", "boat", "child", "woman", "man", "bird", "horse",
    "tree", "house", "bridge", "street", "market", "mountain", "river", "beach", "kitchen", "chair",
    "cup of coffee", "slice of pizza", "guitar", "camera", "umbrella", "sunset", "lighthouse",
]
DOES = [
    "standing", "sitting", "running", "sleeping", "waiting", "moving slowly", "seen from above",
    "left alone", "covered in snow", "photographed", "reflected", "leaning", "shining",
]
WHERE = ["next to", "in front of", "behind", "under", "on top of", "far away from", "inside"]
SYLLABLES = ["ba", "den", "ko", "lu", "mar", "ni", "po", "ra", "shi", "ta", "ver", "zo"]
# fmt: on
# Captions made before any clock starts, and taken in another order for each seed.
CAPTIONS = 50_000
# The share of captions with a word of syllables in it, such as no tokenizer remembers.
RARE = 0.25


def captions(seed: int) -> Iterator[str]:
    """Captions of 5 to 15 words without end, hardly one of them twice; the same for a seed."""
    rng = random.Random(seed)
    while True:
        parts = [WHAT, LIKE, THING, DOES, WHERE, WHAT, LIKE, THING, DOES]
        words = " ".join(rng.choice(part) for part in parts).split()[: rng.randint(5, 15)]
        if rng.random() < RARE:
            words[rng.randrange(len(words))] = "".join(rng.choices(SYLLABLES, k=3))
        yield " ".join(words)


def photos(folder: str, seed: int) -> Iterator[bytes]:
    """The photos of a folder, over and over."""
    files = [file.read_bytes() for file in sorted(Path(folder).glob("*.jpg"))]
    random.Random(seed).shuffle(files)
    return itertools.cycle(files)


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def until(deadline: float, items: Iterable[Item]) -> Iterator[Item]:
    """The items taken before a time of `time.perf_counter`."""
    return itertools.takewhile(lambda _: time.perf_counter() < deadline, items)


class Commands:
    """The operations of a driver: its methods."""

    def serve(self) -> None:
        """Carries out the commands of standard input until it ends."""
        answers = sys.stdout
        sys.stdout = sys.stderr  # what a library prints is no answer
        for line in sys.stdin:
            command = json.loads(line)
            answer = getattr(self, command.pop("op"))(**command)
            print(json.dumps(answer), file=answers, flush=True)


class Driver(Commands, ABC):
    """Drives one client. The operations are `throughput`, `latency` and `vectors`."""

    def __init__(self, photo_folder: str) -> None:
        self.photo_folder = photo_folder
        self.captions = list(itertools.islice(captions(seed=0), CAPTIONS))
        self.loop = asyncio.new_event_loop()

    @abstractmethod
    async def encode(self, items: list[Item]) -> Any:
        """One request: the items' vectors, [N, D]."""

    def stream(self, items: Iterator[Item], batch: int, in_flight: int) -> int:
        """Encodes all items in requests of `batch`, `in_flight` of them at once; how many.

        A client with a better way of its own for many items does it its way.
        """
        requests = batches(items, batch)

        async def work() -> int:
            return sum([len(await self.encode(request)) for request in requests])

        async def work_all() -> int:
            return sum(await asyncio.gather(*(work() for _ in range(in_flight))))

        return self.loop.run_until_complete(work_all())

    def throughput(
        self, kind: str, batch: int, in_flight: int, seconds: float, seed: int, count: int = 0
    ) -> dict[str, float]:
        """Items encoded, and the seconds from the first sent to the last answered.

        count: stops after so many, if that is before `seconds` are over; 0: does not.
        """
        items = self._items(kind, seed)
        if count:
            items = itertools.islice(items, count)
        started = time.perf_counter()
        encoded = self.stream(until(started + seconds, items), batch, in_flight)
        return {"items": encoded, "seconds": time.perf_counter() - started}

    def latency(
        self, in_flight: int, seconds: float, seed: int, pause: float = 0.0
    ) -> dict[str, list[float]]:
        """Milliseconds that each request of one text took, `in_flight` of them at once.

        pause: seconds between an answer and the next request.
        """
        taken: list[float] = []
        deadline = time.perf_counter() + seconds
        texts = until(deadline, self._items("texts", seed))

        async def ask() -> None:
            for text in texts:
                started = time.perf_counter()
                await self.encode([text])
                taken.append(1000 * (time.perf_counter() - started))
                await asyncio.sleep(pause)

        async def ask_all() -> None:
            await asyncio.gather(*(ask() for _ in range(in_flight)))

        self.loop.run_until_complete(ask_all())
        return {"milliseconds": taken}

    def vectors(self, kind: str, count: int) -> dict[str, Any]:
        """Embeddings of the first texts or photos."""
        items = list(itertools.islice(self._items(kind, seed=0), count))
        found = self.loop.run_until_complete(self.encode(items))
        return {"vectors": np.asarray(found, dtype=float).tolist()}

    def _items(self, kind: str, seed: int) -> Iterator[Item]:
        if kind == "photos":
            return photos(self.photo_folder, seed)
        return itertools.cycle(random.Random(seed).sample(self.captions, CAPTIONS))
