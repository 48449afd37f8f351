"""The part of Immich's machine-learning API that is about CLIP. An experiment: Immich has no
documented contract for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway import json_text
from clip_server.gateway.apis.dialect import Dialect
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest
from clip_server.gateway.apis.inputs import PlacedItem, text_item
from clip_server.gateway.http_messages import json_response, read_body
from clip_server.rpc.request_parameters import shown

_EXAMPLE = '{"clip": {"textual": {"modelName": "ViT-B-32__openai"}}}'
# The field of a form with what a task of CLIP's reads.
_FIELDS = {"textual": "text", "visual": "image"}
# A form has entries, and a text or an image.
_MOST_FIELDS = 8


class ImmichApi(Dialect):
    """`/predict` for entries of `clip`, and `/ping`."""

    example = _EXAMPLE

    def routes(self) -> list[Route]:
        """Its routes."""
        return [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/ping", self._ping, methods=["GET"]),
        ]

    def error(self, status: int, code: str, message: str) -> Any:
        """An error."""
        del status, code
        return {"detail": message}

    async def _ping(self, _: Request) -> Response:
        return PlainTextResponse("pong")

    async def _predict(self, request: Request) -> Response:
        form = await _read_form(request, self._most_bytes)
        task, model = _read_entries(form.get("entries"))
        field = _FIELDS[task]
        content = form.get(field)
        if content is None:
            raise RequestError(f"the form has no {field}, which {task} reads")
        if task == "textual":
            item = text_item(content, field)
        else:
            item = pb.Item(image=content.encode() if isinstance(content, str) else content)
        asked = EmbeddingsRequest.parse([PlacedItem(field, item)], {"model": model})
        result = await self._embed(asked, request)
        # Immich passes it on to its database as text.
        return json_response({"clip": json_text.dumps(result.embeddings[0]).decode()})


async def _read_form(request: Request, most: int) -> Mapping[str, str | bytes]:
    """The fields of a multipart form, with files as bytes.

    Raises:
        RequestError: the body is no such form.
    """
    body = await read_body(request, most)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(
        request.headers, stream(), max_files=1, max_fields=_MOST_FIELDS, max_part_size=most
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError):
        raise RequestError(
            "the body is not a multipart form with entries, and text or image"
        ) from None
    try:
        return {
            name: await value.read() if isinstance(value, UploadFile) else value
            for name, value in form.items()
        }
    finally:
        await form.close()


def _read_entries(entries: str | bytes | None) -> tuple[str, Any]:
    """The task of CLIP's, `textual` or `visual`, and the name of the model as it came.

    Raises:
        RequestError: they are about something else.
    """
    content = entries.encode() if isinstance(entries, str) else entries or b"null"
    tasks = json_text.loads(content)
    if not isinstance(tasks, Mapping) or set(tasks) != {"clip"}:
        named = ", ".join(map(str, tasks)) if isinstance(tasks, Mapping) else "none"
        raise RequestError(
            f"entries is about {named[:100]}: this server has CLIP, and neither faces nor OCR; "
            f"send {_EXAMPLE}"
        )
    clip = tasks["clip"]
    given = [task for task in _FIELDS if isinstance(clip, Mapping) and task in clip]
    if len(given) != 1:
        raise RequestError(f"entries.clip is {shown(clip)}: send {_EXAMPLE}")
    described = clip[given[0]]
    return given[0], described.get("modelName") if isinstance(described, Mapping) else None
