"""OpenAI's API of embeddings, which many servers and libraries share, and its list of models.

infinity, Jina and vLLM have the same endpoint, and their ways of sending images are told apart by
the body.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_server.gateway.apis import infinity, jina, vllm
from clip_server.gateway.apis.dialect import Dialect, model_id
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest
from clip_server.gateway.apis.inputs import PlacedItem, one_or_more_items, text_or_image_item
from clip_server.gateway.http_messages import MODEL_NOT_FOUND, json_response
from clip_server.gateway.listener import Listener
from clip_server.gateway.topology import FlowExecutor

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ALIASES = {
    "encoding_format": "forms",
    "embedding_type": "forms",
    "encoding_type": "forms",
    "normalized": "normalize",
}


class OpenAIApi(Dialect):
    """`/v1/embeddings` and `/v1/models`, also without `/v1`."""

    example = '{"model": "...", "input": ["a cat"]}'

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        self._created = int(time.time())

    def routes(self) -> list[Route]:
        """Its routes."""
        return [
            route
            for prefix in ("/v1", "")
            for route in (
                self._post(f"{prefix}/embeddings", self._embeddings),
                Route(f"{prefix}/models", self._models),
                Route(f"{prefix}/models/{{model:path}}", self._model),
            )
        ]

    def error(self, status: int, code: str, message: str) -> Any:
        """An error, with the kinds by which OpenAI's clients choose an exception."""
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        return {
            "error": {
                "message": message,
                "type": kind,
                "param": "model" if code == MODEL_NOT_FOUND else None,
                "code": code.lower(),
            }
        }

    async def _embeddings(self, body: Mapping[str, Any], request: Request) -> Any:
        body = infinity.without_unset(body)
        asked = EmbeddingsRequest.parse(_items(body), body, _ALIASES, jina.READERS)
        result = await self._embed(asked, request)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": embedding}
                for index, embedding in enumerate(result.as_json_in(asked.forms))
            ],
            "model": result.model,
            "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
        }

    async def _models(self, _: Request) -> Response:
        encoders = self._listener.router.encoders
        return json_response({"object": "list", "data": [self._described(e) for e in encoders]})

    async def _model(self, request: Request) -> Response:
        encoder = self._listener.router.encoder(request.path_params["model"])
        return json_response(self._described(encoder))

    def _described(self, encoder: FlowExecutor) -> dict[str, Any]:
        aliases = encoder.info.aliases if encoder.info else ()
        return {
            "id": model_id(encoder, self._listener.router.encoders),
            "object": "model",
            "created": self._created,
            "owned_by": "clip-microservice",
            "aliases": list(dict.fromkeys([encoder.name, *aliases])),
        }


def _items(body: Mapping[str, Any]) -> list[PlacedItem]:
    """The items of a body of any of the dialects."""
    if body.get("messages") is not None:
        return vllm.items(body)
    return one_or_more_items(body, "input", infinity.item_reader(body) or _item)


def _item(value: Any, place: str) -> pb.Item:
    return (jina.item if isinstance(value, Mapping) else text_or_image_item)(value, place)
