"""Drives this project's client: `clip_server_driver.py ADDRESS PHOTOS`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from driver import Driver, Item

from clip_client import Client


class ClipServerDriver(Driver):
    def __init__(self, address: str, photo_folder: str) -> None:
        super().__init__(photo_folder)
        self.client = Client(address)

    async def encode(self, items: list[Item]) -> Any:
        return await self.client.aencode(items)

    def stream(self, items: Iterator[Item], batch: int, in_flight: int) -> int:
        return len(self.client.encode(items, batch_size=batch, prefetch=in_flight))


if __name__ == "__main__":
    ClipServerDriver(*sys.argv[1:]).serve()
