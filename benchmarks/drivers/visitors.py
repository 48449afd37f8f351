"""Everything at once, for the soak: `visitors.py SECONDS PHOTOS ADDRESS ...`.

Clients that come, ask for texts, photos, rankings and what cannot be encoded, break off now and
then, and go. First they call as fast as they are answered, which shows the capacity, then at four
fifths of that rate. Prints how many items were answered, failed and dropped; then, as JSON, the
99th percentile of the calls of each half minute, as minutes since the start and milliseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter

from driver import Item, captions, photos

from clip_client import Client

VISITORS_OF_EACH_ADDRESS = 3
CALLS_OF_A_VISIT = 20
BROKEN_OFF = 0.05
# The share of the time in which the capacity is measured, in seconds at least, and the share of the
# capacity that is used then.
MEASURED, LEAST_MEASURED_SECONDS, USED = 0.05, 15.0, 0.8
PART_SECONDS = 30.0


class Pace:
    """Delays calls so that all visitors together stay below the capacity."""

    def __init__(self, seconds: float) -> None:
        self.begun = time.monotonic()
        self.calls: list[tuple[float, float]] = []  # when each ended, and how long it took
        measured = max(MEASURED * seconds, LEAST_MEASURED_SECONDS)
        self._measured_until = self.begun + measured
        self._interval = self._due = 0.0

    async def wait(self) -> None:
        """Waits until the next call is due."""
        now = time.monotonic()
        if now < self._measured_until:
            return
        if not self._interval:
            self._interval = (now - self.begun) / max(len(self.calls), 1) / USED
        self._due = max(self._due + self._interval, now)
        await asyncio.sleep(self._due - now)

    def note(self, started: float) -> None:
        """Notes a call that was answered."""
        ended = time.monotonic()
        self.calls.append((ended - self.begun, ended - started))

    def percentiles(self) -> list[tuple[float, float]]:
        """Minutes and the 99th percentile in milliseconds, of each part of the time."""
        parts: dict[int, list[float]] = {}
        for ended, seconds in self.calls:
            parts.setdefault(int(ended // PART_SECONDS), []).append(seconds)
        return [
            ((number + 1) * PART_SECONDS / 60, 1e3 * sorted(taken)[int(0.99 * len(taken))])
            for number, taken in sorted(parts.items())
        ]


class Visitor:
    """Visits one address until it is time to go."""

    def __init__(
        self, address: str, photo_folder: str, seed: int, counts: Counter[str], pace: Pace
    ) -> None:
        self.address, self.counts, self.pace = address, counts, pace
        self.random = random.Random(seed)
        self.texts, self.photos = captions(seed), photos(photo_folder, seed)

    async def stay(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            async with Client(self.address) as client:
                for _ in range(self.random.randint(1, CALLS_OF_A_VISIT)):
                    if time.monotonic() < deadline:
                        await self.call(client)
            self.counts["visits"] += 1

    async def call(self, client: Client) -> None:
        items = self.items()
        await self.pace.wait()
        started = time.monotonic()
        call = asyncio.ensure_future(client.aencode(items, on_item_error="return"))
        if self.random.random() < BROKEN_OFF:
            await asyncio.sleep(self.random.uniform(0, 0.02))
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            self.counts["broken off"] += 1
            return
        _, failures = await call
        self.pace.note(started)
        self.counts["items"] += len(items)
        self.counts["refused"] += len(failures)

    def items(self) -> list[Item | dict[str, str]]:
        kind = self.random.choice(["text", "texts", "photos", "bad"])
        if kind == "bad":
            photo = next(self.photos)
            bad = [{"text": next(self.texts)}, b"no picture", photo[: len(photo) // 2]]
            return [*bad, {"uri": "data:image/png;base64,AAAA"}, next(self.texts)]
        if kind == "photos":
            return list(itertools.islice(self.photos, self.random.randint(1, 4)))
        count = 1 if kind == "text" else self.random.randint(2, 300)
        return list(itertools.islice(self.texts, count))


async def main(seconds: float, photo_folder: str, addresses: list[str]) -> None:
    counts: Counter[str] = Counter()
    pace = Pace(seconds)
    deadline = time.monotonic() + seconds
    visitors = [
        Visitor(address, photo_folder, seed, counts, pace)
        for seed, address in enumerate(addresses * VISITORS_OF_EACH_ADDRESS)
    ]
    await asyncio.gather(*(visitor.stay(deadline) for visitor in visitors))
    print(", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())))
    print(json.dumps(pace.percentiles()))


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
