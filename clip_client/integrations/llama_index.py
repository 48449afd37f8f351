"""CLIP as LlamaIndex's `MultiModalEmbedding`."""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import Any

from clip_client.integrations.unit_embedder import UnitEmbedder

try:
    from llama_index.core.base.embeddings.base import Embedding
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.embeddings import MultiModalEmbedding
    from llama_index.core.schema import ImageType
except ImportError as error:
    raise ImportError(
        "clip_client.integrations.llama_index needs LlamaIndex: pip install llama-index-core"
    ) from error


class ClipEmbedding(MultiModalEmbedding):
    """Embeddings of texts and images by a server, of length 1.

    server: the first argument of `Client`.
    model_name: one of several models of the server; by default its first.
    embed_batch_size: items per request.
    options: further arguments of `Client`, and fields of LlamaIndex's embeddings, such as
        `callback_manager`, `num_workers` and `embeddings_cache`.

    Every method raises as `Client.encode`.
    """

    _embedder: UnitEmbedder = PrivateAttr()

    def __init__(
        self,
        server: str,
        *,
        model_name: str | None = None,
        embed_batch_size: int = 32,
        **options: Any,
    ) -> None:
        fields = {name: options.pop(name) for name in type(self).model_fields if name in options}
        super().__init__(
            model_name=model_name or server, embed_batch_size=embed_batch_size, **fields
        )
        self._embedder = UnitEmbedder(server, model_name, options)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores."""
        return "ClipEmbedding"

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._get_text_embeddings([query])[0]

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._embedder.texts(texts)

    def _get_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return self._embedder.images(_readable(img_file_paths))

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return (await self._aget_text_embeddings([query]))[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return (await self._aget_text_embeddings([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await self._embedder.atexts(texts)

    async def _aget_image_embedding(self, img_file_path: ImageType) -> Embedding:
        return (await self._aget_image_embeddings([img_file_path]))[0]

    async def _aget_image_embeddings(self, img_file_paths: list[ImageType]) -> list[Embedding]:
        return await self._embedder.aimages(_readable(img_file_paths))


def _readable(images: Iterable[ImageType]) -> list[Any]:
    return [each.getvalue() if isinstance(each, BytesIO) else each for each in images]
