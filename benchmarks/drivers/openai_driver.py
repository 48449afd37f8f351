"""Drives an OpenAI-style embeddings API on connections kept open: `openai_driver.py URL PHOTOS`.

It asks for base64. Images are sent in infinity's way.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from typing import Any

import aiohttp
import numpy as np
import orjson
from driver import Driver, Item


class OpenAIDriver(Driver):
    def __init__(self, url: str, photo_folder: str) -> None:
        super().__init__(photo_folder)
        self.url = f"{url}/embeddings"
        self.session = self.loop.run_until_complete(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        # Servers close connections that are idle for 5 s, as while another one is measured.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
        return aiohttp.ClientSession(connector=connector)

    async def encode(self, items: list[Item]) -> Any:
        body: dict[str, Any] = {"model": "clip", "input": items, "encoding_format": "base64"}
        if isinstance(items[0], bytes):
            uris = [f"data:image/jpeg;base64,{base64.b64encode(each).decode()}" for each in items]
            body |= {"input": uris, "modality": "image"}
        headers = {"Content-Type": "application/json"}
        content = orjson.dumps(body)
        async with self.session.post(self.url, data=content, headers=headers) as answer:
            if wait := answer.headers.get("Retry-After"):  # it is full
                await asyncio.sleep(float(wait))
                return await self.encode(items)
            answer.raise_for_status()
            data = orjson.loads(await answer.read())["data"]
        return [np.frombuffer(base64.b64decode(each["embedding"]), np.float32) for each in data]


if __name__ == "__main__":
    OpenAIDriver(*sys.argv[1:]).serve()
