"""The API that Weaviate's module multi2vec-clip asks for vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_server.errors import RequestError
from clip_server.gateway.apis.dialect import Dialect, model_id
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest
from clip_server.gateway.apis.inputs import image_item, listed_items, text_item
from clip_server.gateway.http_messages import json_response


class WeaviateApi(Dialect):
    """`/vectorize` and `/meta`."""

    example = '{"texts": ["a cat"], "images": ["iVBORw0..."]}'

    def routes(self) -> list[Route]:
        """Its routes."""
        return [self._post("/vectorize", self._vectors), Route("/meta", self._meta)]

    def error(self, status: int, code: str, message: str) -> Any:
        """An error."""
        del status, code
        return {"error": message}

    async def _vectors(self, body: Mapping[str, Any], request: Request) -> Any:
        given = {key: body[key] for key in ("texts", "images") if body.get(key) is not None}
        if not given:
            raise RequestError(f"give texts, images or both, as {self.example}")
        texts = listed_items(given.get("texts", []), "texts", text_item)
        images = listed_items(given.get("images", []), "images", image_item)
        asked = EmbeddingsRequest.parse([*texts, *images], {"model": body.get("model")})
        vectors = (await self._embed(asked, request)).as_json("float")
        return {"textVectors": vectors[: len(texts)], "imageVectors": vectors[len(texts) :]}

    async def _meta(self, _: Request) -> Response:
        encoders = self._listener.router.encoders
        return json_response({"models": [model_id(each, encoders) for each in encoders]})
