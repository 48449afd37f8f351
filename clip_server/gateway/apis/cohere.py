"""Cohere's API of embeddings, version 2."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.apis.dialect import Dialect
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest, only
from clip_server.gateway.apis.inputs import (
    PlacedItem,
    image_item,
    listed_items,
    part_item,
    text_item,
)


class CohereApi(Dialect):
    """`/v2/embed`."""

    example = '{"model": "...", "input_type": "search_query", "texts": ["a cat"]}'

    def routes(self) -> list[Route]:
        """Its routes."""
        return [self._post("/v2/embed", self._answer)]

    def error(self, status: int, code: str, message: str) -> Any:
        """An error."""
        del status, code
        return {"message": message}

    async def _answer(self, body: Mapping[str, Any], request: Request) -> Any:
        asked = EmbeddingsRequest.parse(_items(body), body, _ALIASES, _READERS)
        result = await self._embed(asked, request)
        images = sum(not each.item.HasField("text") for each in asked.items)
        return {
            "id": str(uuid.uuid4()),
            "embeddings": {form: result.as_json(form) for form in asked.forms},
            "texts": body.get("texts") or [],
            "response_type": "embeddings_by_type",
            "meta": {
                "api_version": {"version": "2"},
                "billed_units": {"input_tokens": result.tokens, "images": images},
            },
        }


def _items(body: Mapping[str, Any]) -> list[PlacedItem]:
    readers = {"texts": text_item, "images": image_item, "inputs": _input_item}
    given = [key for key in readers if body.get(key) is not None]
    if len(given) != 1 or body[given[0]] == []:
        raise RequestError("give exactly one of texts, images and inputs, a list of at least one")
    return listed_items(body[given[0]], given[0], readers[given[0]])


def _input_item(value: Any, place: str) -> pb.Item:
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, list) or len(content) != 1:
        raise RequestError(
            f"{place}: a CLIP model embeds one text or one image at a time: content is a list of "
            'one part, as [{"type": "text", "text": "a cat"}]'
        )
    return part_item(content[0], f"{place}.content[0]")


def _truncates(name: str, value: Any) -> bool:
    """Whether texts are truncated."""
    return bool(only("END", "NONE")(name, value) == "END")


_ALIASES = {"output_dimension": "dimensions", "embedding_types": "forms"}
_READERS = {
    "input_type": only("search_document", "search_query", "classification", "clustering", "image"),
    "truncate": _truncates,
}
