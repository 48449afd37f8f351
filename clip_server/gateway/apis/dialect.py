"""The base of the dialects of other servers.

They have no errors of single items: a request is answered as a whole or refused. They normalise
embeddings unless the request says otherwise.
"""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_client.quantization import quantize
from clip_client.scores import normalize
from clip_server.errors import RequestError
from clip_server.gateway.apis.embeddings_request import EmbeddingsRequest
from clip_server.gateway.apis.entries import encode_request
from clip_server.gateway.apis.inputs import PlacedItem
from clip_server.gateway.http_messages import ask, json_response, parse_object, read_body
from clip_server.gateway.listener import Listener
from clip_server.gateway.topology import FlowExecutor
from clip_server.rpc.errors import check_count

# Items that an error names.
_MOST_NAMED = 3


@dataclass(frozen=True)
class EmbeddingsResult:
    """The answer to a request.

    model: its id, as `model_id` has it.
    embeddings: [N, D] float32.
    tokens: of all texts together.
    """

    model: str
    embeddings: NDArray[np.float32] = field(repr=False)
    tokens: int = 0

    def as_json(self, form: str) -> list[Any]:
        """The embeddings in one of `FORMATS`."""
        if form == "base64":
            rows = self.embeddings.astype("<f4", copy=False)
            return [base64.b64encode(row).decode() for row in rows]
        return list(self.embeddings if form == "float" else quantize(self.embeddings, form))

    def as_json_in(self, forms: Sequence[str]) -> list[Any]:
        """The embeddings in a single form, or each of them as an object by form."""
        if len(forms) == 1:
            return self.as_json(forms[0])
        columns = [self.as_json(form) for form in forms]
        return [dict(zip(forms, row, strict=True)) for row in zip(*columns, strict=True)]


class Dialect(ABC):
    """The routes of another server's API.

    listener: of the port.
    """

    # A body that it takes, for error messages.
    example: str

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    @abstractmethod
    def routes(self) -> list[Route]:
        """Its routes."""

    @abstractmethod
    def error(self, status: int, code: str, message: str) -> Any:
        """The content of a response with an error. code: a name of clip.v1's, NOT_FOUND,
        METHOD_NOT_ALLOWED or MODEL_NOT_FOUND."""

    @property
    def _most_bytes(self) -> int:
        return self._listener.options.max_request_bytes

    def _post(
        self, path: str, answer: Callable[[Mapping[str, Any], Request], Awaitable[Any]]
    ) -> Route:
        """A route for JSON. answer: makes the content of the response from that of the body."""

        async def endpoint(request: Request) -> Response:
            body = parse_object(await read_body(request, self._most_bytes), self.example)
            self._check_counts(body)
            return json_response(await answer(body, request))

        return Route(path, endpoint, methods=["POST"])

    def _check_counts(self, body: Mapping[str, Any]) -> None:
        """Raises RequestError if a list in a body is longer than a request may have items: before
        any of them is looked at, which takes time that others wait."""
        for value in body.values():
            if isinstance(value, list):
                check_count(len(value), self._listener.router.max_request_items)

    async def _embed(self, asked: EmbeddingsRequest, request: Request) -> EmbeddingsResult:
        """The embeddings that a request asks for.

        Raises:
            UnservedModelError: there is no such model.
            RequestError: an item has no embedding, the model's embeddings cannot be cut like this,
                or the server refuses.
        """
        router = self._listener.router
        encoder = router.encoder(asked.model)
        _check_dimensions(asked.dimensions, encoder)
        check_count(len(asked.items), router.max_request_items)
        items = (each.item for each in asked.items)
        message = encode_request(items, encoder.name, asked.normalize)
        encoded: pb.EncodeResponse = await ask(self._listener.call, message, request)
        for error in encoded.errors:
            raise RequestError(f"{asked.items[error.index].place}: {error.message}")
        if encoded.truncated and not asked.truncate:
            raise RequestError(_too_long(asked.items, encoded))
        embeddings = np.frombuffer(encoded.embeddings, "<f4").reshape(encoded.count, encoded.dim)
        if asked.dimensions:
            embeddings = embeddings[:, : asked.dimensions]
            embeddings = normalize(embeddings) if asked.normalize else embeddings
        return EmbeddingsResult(model_id(encoder, router.encoders), embeddings, encoded.tokens)


def _too_long(items: Sequence[PlacedItem], encoded: pb.EncodeResponse) -> str:
    """Names the texts that were truncated, where the request says not to."""
    # Unknown where other executors of the flow take part.
    places = [items[index].place for index in encoded.truncated_items]
    named = ", ".join(places[:_MOST_NAMED]) or "texts"
    more = f" and {len(places) - _MOST_NAMED:,} more" if len(places) > _MOST_NAMED else ""
    return f"{named}{more}: longer than the model reads, and the request says not to truncate"


def model_id(encoder: FlowExecutor, encoders: Sequence[FlowExecutor]) -> str:
    """The name of an encoder's model, or of the encoder itself if an earlier one has the same."""
    models = [each.info.model for each in encoders if each.info]
    place = encoders.index(encoder)
    return encoder.name if models[place] in models[:place] else models[place]


def _check_dimensions(dimensions: int, encoder: FlowExecutor) -> None:
    """Raises RequestError unless embeddings can be cut to this length; 0: they are not."""
    info = encoder.info
    if not dimensions or info is None:
        return
    if not info.matryoshka_dimensions:
        raise RequestError(
            f"dimensions: the embeddings of {info.model} have {info.dim} dimensions, and cannot be "
            "cut: only those of Matryoshka models can; leave dimensions out"
        )
    allowed = sorted({*info.matryoshka_dimensions, info.dim})
    if dimensions not in allowed:
        raise RequestError(
            f"dimensions is {dimensions:,}; the embeddings of {info.model} can be cut to "
            f"{', '.join(map(str, allowed))}"
        )
