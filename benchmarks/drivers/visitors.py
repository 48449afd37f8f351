"""Everything at once, for the soak: `visitors.py SECONDS PHOTOS ADDRESS ...`.

Clients that come, ask for texts, photos, rankings and what cannot be encoded, break off now and
then, and go. Prints how many items were answered, failed and dropped.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import time
from collections import Counter

from driver import Item, captions, photos

from clip_client import Client

VISITORS_OF_EACH_ADDRESS = 3
CALLS_OF_A_VISIT = 20
BROKEN_OFF = 0.05


class Visitor:
    """Visits one address until it is time to go."""

    def __init__(self, address: str, photo_folder: str, seed: int, counts: Counter[str]) -> None:
        self.address, self.counts = address, counts
        self.random = random.Random(seed)
        self.texts, self.photos = captions(seed), photos(photo_folder, seed)

    async def stay(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            async with Client(self.address) as client:
                for _ in range(self.random.randint(1, CALLS_OF_A_VISIT)):
                    await self.call(client)
            self.counts["visits"] += 1

    async def call(self, client: Client) -> None:
        items = self.items()
        call = asyncio.ensure_future(client.aencode(items, on_item_error="return"))
        if self.random.random() < BROKEN_OFF:
            await asyncio.sleep(self.random.uniform(0, 0.02))
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            self.counts["broken off"] += 1
            return
        _, failures = await call
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
    deadline = time.monotonic() + seconds
    visitors = [
        Visitor(address, photo_folder, seed, counts)
        for seed, address in enumerate(addresses * VISITORS_OF_EACH_ADDRESS)
    ]
    await asyncio.gather(*(visitor.stay(deadline) for visitor in visitors))
    print(", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())))


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), sys.argv[2], sys.argv[3:]))
