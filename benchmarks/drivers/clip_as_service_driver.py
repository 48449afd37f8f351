"""Drives clip-as-service's client: `clip_as_service_driver.py ADDRESS PHOTOS`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from docarray import Document
from driver import Driver, Item, batches

from clip_client import Client


class ClipAsServiceDriver(Driver):
    def __init__(self, address: str, photo_folder: str) -> None:
        super().__init__(photo_folder)
        self.client = Client(address)

    async def encode(self, items: list[Item]) -> Any:
        return (await self.client.aencode(list(_documents(items)))).embeddings

    def stream(self, items: Iterator[Item], batch: int, in_flight: int) -> int:
        # Lists, since this client reads a generator to its end before it waits for answers.
        lists = batches(items, batch * in_flight)
        return sum(len(self._encode(each, batch)) for each in lists)

    def _encode(self, items: list[Item], batch: int) -> Any:
        return self.client.encode(list(_documents(items)), batch_size=batch).embeddings


def _documents(items: Iterable[Item]) -> Iterator[Document]:
    for item in items:
        yield Document(text=item) if isinstance(item, str) else Document(blob=item)


if __name__ == "__main__":
    ClipAsServiceDriver(*sys.argv[1:]).serve()
