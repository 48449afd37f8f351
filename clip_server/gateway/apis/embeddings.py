"""Embeddings as the dialects of other servers ask for them.

These dialects have no errors of single items: a request is answered as a whole or refused. They
normalise embeddings unless the request says otherwise.
"""

from __future__ import annotations

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from clip_client.proto import clip_pb2 as pb
from clip_client.quantization import QUANTIZERS, quantize
from clip_client.scores import normalize
from clip_server.errors import RequestError
from clip_server.gateway.apis.entries import encode_request, find_fault, read_content
from clip_server.gateway.http_messages import (
    answer_errors_in,
    ask,
    json_response,
    parse_object,
    read_body,
)
from clip_server.gateway.listener import Listener
from clip_server.gateway.topology import FlowExecutor
from clip_server.rpc.errors import check_count
from clip_server.rpc.request_parameters import flag, name_of, read_mapping, shown

# Reads a field of a body, given its name and its value.
Reader: TypeAlias = Callable[[str, Any], Any]
_NONE: Mapping[str, Any] = MappingProxyType({})
# The forms of embeddings in a response.
FORMATS = ("float", "base64", *QUANTIZERS)
_MOST_DIMENSIONS = 2**31
# A str that may be any text is an image if it begins so.
_IMAGE_URI = re.compile(r"\s*data:image/", re.IGNORECASE)
# Base64 has no colon.
_URI = re.compile(r"\s*[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Named(NamedTuple):
    """An item of a request and its place in the body, such as `input[0]`, for error messages."""

    place: str
    item: pb.Item


@dataclass(frozen=True)
class Wanted:
    """The embeddings that a request asks for.

    model: a name of the model; "": the first.
    dimensions: length to which embeddings are cut; 0: they are not.
    truncate: whether texts longer than the model's context are truncated; else they are an error.
    forms: of `FORMATS`, in which the embeddings are returned, for dialects that have a choice.
    """

    items: Sequence[Named]
    model: str = ""
    normalize: bool = True
    dimensions: int = 0
    truncate: bool = True
    forms: Sequence[str] = ("float",)


@dataclass(frozen=True)
class Embedded:
    """The answer to a request.

    model: its id, as `model_id` has it.
    embeddings: [N, D] float32.
    tokens: of all texts together.
    """

    model: str
    embeddings: NDArray[np.float32] = field(repr=False)
    tokens: int = 0

    def shown(self, form: str) -> list[Any]:
        """The embeddings in one of `FORMATS`, as they stand in JSON."""
        if form == "base64":
            rows = self.embeddings.astype("<f4", copy=False)
            return [base64.b64encode(row).decode() for row in rows]
        return list(self.embeddings if form == "float" else quantize(self.embeddings, form))

    def shown_in(self, forms: Sequence[str]) -> list[Any]:
        """The embeddings in a single form, or each of them as an object by form."""
        if len(forms) == 1:
            return self.shown(forms[0])
        columns = [self.shown(form) for form in forms]
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
        """The content of a response with an error. code: a name of clip.v1's, or NOT_FOUND."""

    @property
    def _most_bytes(self) -> int:
        return self._listener.options.max_request_bytes

    def _post(
        self, path: str, answer: Callable[[Mapping[str, Any], Request], Awaitable[Any]]
    ) -> Route:
        """A route for JSON. answer: makes the content of the response from that of the body."""

        async def endpoint(request: Request) -> Response:
            answer_errors_in(self.error, request)
            body = parse_object(await read_body(request, self._most_bytes), self.example)
            return json_response(await answer(body, request))

        return Route(path, endpoint, methods=["POST"])

    def _get(self, path: str, answer: Callable[[Request], Awaitable[Response]]) -> Route:
        """A route without a body."""

        async def endpoint(request: Request) -> Response:
            answer_errors_in(self.error, request)
            return await answer(request)

        return Route(path, endpoint, methods=["GET"])

    async def _embed(self, wanted: Wanted, request: Request) -> Embedded:
        """The embeddings that a request asks for.

        Raises:
            UnservedModelError: there is no such model.
            RequestError: an item has no embedding, the model's embeddings cannot be cut like this,
                or the server refuses.
        """
        router = self._listener.router
        encoder = router.encoder(wanted.model)
        _check_dimensions(wanted.dimensions, encoder)
        check_count(len(wanted.items), router.max_request_items)
        items = (each.item for each in wanted.items)
        message = encode_request(items, encoder.name, wanted.normalize)
        encoded: pb.EncodeResponse = await ask(self._listener.call, message, request)
        for error in encoded.errors:
            raise RequestError(f"{wanted.items[error.index].place}: {error.message}")
        if encoded.truncated and not wanted.truncate:
            raise RequestError(
                f"truncate is false, and {encoded.truncated:,} of the texts are longer than the "
                "model reads"
            )
        embeddings = np.frombuffer(encoded.embeddings, "<f4").reshape(encoded.count, encoded.dim)
        if wanted.dimensions:
            embeddings = embeddings[:, : wanted.dimensions]
            embeddings = normalize(embeddings) if wanted.normalize else embeddings
        return Embedded(model_id(encoder, router.encoders), embeddings, encoded.tokens)


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


def text_item(value: Any, place: str) -> pb.Item:
    """The item of a text. Raises RequestError if it is no valid one."""
    if not isinstance(value, str):
        raise RequestError(f"{place} is {shown(value)}, which is not a string")
    if fault := find_fault(value):
        raise RequestError(f"{place}: {fault}")
    return pb.Item(text=value)


def image_item(value: Any, place: str) -> pb.Item:
    """The item of an image: a URI, or base64 without one. Raises RequestError for anything else."""
    text_item(value, place)
    return pb.Item(uri=value) if _URI.match(value[:64]) else read_content("image", value)


def text_or_image_item(value: Any, place: str) -> pb.Item:
    """The item of a string: an image if it begins with `data:image/`, else a text."""
    is_image = isinstance(value, str) and _IMAGE_URI.match(value) is not None
    return image_item(value, place) if is_image else text_item(value, place)


def part_item(part: Any, place: str) -> pb.Item:
    """The item of a part of a chat message, as OpenAI's and Cohere's APIs have them."""
    fields = part if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind == "text":
        return text_item(fields.get("text"), f"{place}.text")
    if kind in ("image_url", "image"):
        image = fields.get(kind)
        url = image.get("url") if isinstance(image, Mapping) else image
        return image_item(url, f"{place}.{kind}")
    raise RequestError(
        f"{place} is {shown(part)}, which is none of "
        '{"type": "text", "text": "a cat"} and '
        '{"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}'
    )


def items_of(values: Any, place: str, read: Callable[[Any, str], pb.Item]) -> list[Named]:
    """The items of a list in a body. Raises RequestError if it is no list."""
    if not isinstance(values, list):
        raise RequestError(f"{place} is {shown(values)}, which is not a list")
    places = [f"{place}[{index}]" for index in range(len(values))]
    return [Named(at, read(value, at)) for at, value in zip(places, values, strict=True)]


def refuse_token_ids(values: Any, place: str) -> None:
    """Raises RequestError for token ids in place of texts, or lists of them."""
    if isinstance(values, list) and any(isinstance(value, (int, list)) for value in values):
        raise RequestError(
            f"{place} has token ids, which are those of another model's tokenizer: send texts; in "
            "LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False) does"
        )


def read_wanted(
    items: Sequence[Named],
    body: Mapping[str, Any],
    aliases: Mapping[str, str] = _NONE,
    readers: Mapping[str, Reader] = _NONE,
) -> Wanted:
    """What a body asks for.

    items: in the body.
    aliases: the dialect's names of the fields of `Wanted`.
    readers: the dialect's own, of fields of `Wanted` or of others, which are only checked.

    Raises:
        RequestError: a field has a wrong value.
    """
    values = read_mapping(body, {**_READERS, **readers}, aliases, refuse_unknown=False)
    return Wanted(items, **{name: value for name, value in values.items() if name in _READERS})


def only(*allowed: Any) -> Reader:
    """A reader of a field of which the server supports these values only, and null."""

    def read(name: str, value: Any) -> Any:
        if value not in allowed:
            names = ", ".join(map(repr, allowed)) or "null"
            raise RequestError(f"{name} is {shown(value)}; this server supports only {names}")
        return value

    return read


def _forms(name: str, value: Any) -> list[str]:
    """A form, or a list of at least one."""
    forms = value if isinstance(value, list) else [value]
    if not forms or not all(each in FORMATS for each in forms):
        raise RequestError(f"{name} is {shown(value)}: the allowed are {', '.join(FORMATS)}")
    return list(dict.fromkeys(forms))


def _dimensions(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < _MOST_DIMENSIONS:
        raise RequestError(f"{name} is {shown(value)}, which is not a whole number from 1")
    return value


_READERS: dict[str, Reader] = {
    "model": name_of,
    "normalize": flag,
    "dimensions": _dimensions,
    "truncate": flag,
    "forms": _forms,
}
