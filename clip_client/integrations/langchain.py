"""CLIP as LangChain's `Embeddings`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clip_client.integrations.unit_embedder import UnitEmbedder

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise ImportError(
        "clip_client.integrations.langchain needs LangChain: pip install langchain-core"
    ) from error


class ClipEmbeddings(Embeddings):
    """Embeddings of texts and images by a server, of length 1.

    server, **options: the arguments of `Client`.
    model: one of several models of the server.

    Every method raises as `Client.encode`, and has an async version, whose name starts with `a`.
    """

    def __init__(self, server: str, *, model: str | None = None, **options: Any) -> None:
        self._embedder = UnitEmbedder(server, model, options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embeds texts: [N, D]. None of them is taken for a path."""
        return self._embedder.texts(texts)

    def embed_query(self, text: str) -> list[float]:
        """Embeds a text: [D]."""
        return self.embed_documents([text])[0]

    def embed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        """Embeds images: [N, D]. uris: paths, URLs, `data:` URIs, bytes or PIL images."""
        return self._embedder.images(uris)

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        return await self._embedder.atexts(texts)

    async def aembed_query(self, text: str) -> list[float]:
        return (await self.aembed_documents([text]))[0]

    async def aembed_image(self, uris: Sequence[Any]) -> list[list[float]]:
        return await self._embedder.aimages(uris)
