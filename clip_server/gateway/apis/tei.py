"""The API of Hugging Face's text-embeddings-inference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_server.gateway.apis.dialect import Dialect
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest, only
from clip_server.gateway.apis.inputs import one_or_more_items, text_or_image_item
from clip_server.gateway.http_messages import answer_errors_in, json_response

_TYPES = {429: "Overloaded", 503: "Unhealthy"}
# A CLIP model has no prompts, and reads the beginning of a text.
_READERS = {"prompt_name": only(), "truncation_direction": only("Right", "right")}


class TeiApi(Dialect):
    """`/embed`, which is also at `/` as Hugging Face's clients call it."""

    example = '{"inputs": ["a cat"]}'

    def routes(self) -> list[Route]:
        """Its routes."""
        return [self._post("/embed", self._embeddings)]

    @staticmethod
    def claims(body: Mapping[str, Any]) -> bool:
        """Whether a body sent to `/`, which is an endpoint of Jina's too, is of this dialect."""
        return "inputs" in body and "data" not in body

    async def answer(self, body: Mapping[str, Any], request: Request) -> Response:
        """The response to a body sent to `/`."""
        answer_errors_in(self.error, request.scope)
        self._check_counts(body)
        return json_response(await self._embeddings(body, request))

    def error(self, status: int, code: str, message: str) -> Any:
        """An error, with its kind as TEI names it."""
        del code
        kind = _TYPES.get(status, "Validation" if status < 500 else "Backend")
        return {"error": message, "error_type": kind}

    async def _embeddings(self, body: Mapping[str, Any], request: Request) -> Any:
        items = one_or_more_items(body, "inputs", text_or_image_item)
        asked = EmbeddingsRequest.parse(items, body, readers=_READERS)
        return (await self._embed(asked, request)).as_json("float")


def describe(info: pb.InfoResponse) -> dict[str, Any]:
    """The fields that TEI's `/info` has, of our own."""
    return {
        "model_id": info.model,
        "model_dtype": {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(
            info.dtype, info.dtype
        ),
        "model_type": {"embedding": {"pooling": "clip"}},
        "max_input_length": info.context_length,
        "max_client_batch_size": info.max_request_items,
        "auto_truncate": True,
    }
