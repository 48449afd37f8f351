"""The calls that the integrations share: embeddings of length 1, as lists of numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clip_client.client import Client


class UnitEmbedder:
    """Embeds texts and images with one model of a server; raises as `Client.encode`.

    model: one of several models of the server; None: its first.
    options: arguments of `Client`.
    """

    def __init__(self, server: str, model: str | None, options: dict[str, Any]) -> None:
        self._client, self._model = Client(server, **options), model

    def texts(self, texts: Iterable[str]) -> list[list[float]]:
        """Embeds texts: [N, D]. None of them is taken for a path."""
        return self._embed(_items("text", texts))

    def images(self, images: Iterable[Any]) -> list[list[float]]:
        """Embeds images: [N, D]. images: paths, URLs, `data:` URIs, bytes or PIL images."""
        return self._embed(_items("image", images))

    async def atexts(self, texts: Iterable[str]) -> list[list[float]]:
        return await self._aembed(_items("text", texts))

    async def aimages(self, images: Iterable[Any]) -> list[list[float]]:
        return await self._aembed(_items("image", images))

    def _embed(self, items: list[dict[str, Any]]) -> list[list[float]]:
        rows: list[list[float]] = self._client.encode(
            items, normalize=True, model=self._model
        ).tolist()
        return rows

    async def _aembed(self, items: list[dict[str, Any]]) -> list[list[float]]:
        embeddings = await self._client.aencode(items, normalize=True, model=self._model)
        rows: list[list[float]] = embeddings.tolist()
        return rows


def _items(kind: str, contents: Iterable[Any]) -> list[dict[str, Any]]:
    return [{kind: content} for content in contents]
