"""Items of the bodies that the dialects of other servers have: texts, images and parts of chats."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway.apis.entries import find_fault, read_content
from clip_server.rpc.request_parameters import shown

# A str that may be any text is an image if it begins so.
_IMAGE_URI = re.compile(r"\s*data:image/", re.IGNORECASE)
# Base64 has no colon.
_ADDRESS = re.compile(r"\s*(?!data:)[a-z][a-z0-9+.-]*:", re.IGNORECASE)

# Makes an item of a value in a body, given its place there for error messages.
ItemReader: TypeAlias = Callable[[Any, str], pb.Item]


class PlacedItem(NamedTuple):
    """An item of a request and its place in the body, such as `input[0]`, for error messages."""

    place: str
    item: pb.Item


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
    return read_content("uri" if _ADDRESS.match(value[:64]) else "image", value)


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


def listed_items(values: Any, place: str, read: ItemReader) -> list[PlacedItem]:
    """The items of a list in a body. Raises RequestError if it is no list."""
    if not isinstance(values, list):
        raise RequestError(f"{place} is {shown(values)}, which is not a list")
    places = [f"{place}[{index}]" for index in range(len(values))]
    return [PlacedItem(at, read(value, at)) for at, value in zip(places, values, strict=True)]


def one_or_more_items(body: Mapping[str, Any], field: str, read: ItemReader) -> list[PlacedItem]:
    """The items of a field that holds one of them or a list of at least one.

    Raises:
        RequestError: it does not; it may hold token ids, which clients of OpenAI's API send.
    """
    given = body.get(field)
    if given is None or given == []:
        raise RequestError(f'"{field}" is a text, or a list of at least one')
    if not isinstance(given, list):
        return [PlacedItem(field, read(given, field))]
    if _are_token_ids(given) or any(map(_are_token_ids, given)):
        raise RequestError(
            f"{field} has token ids, which are those of another model's tokenizer: send texts; in "
            "LangChain, OpenAIEmbeddings(check_embedding_ctx_length=False) does"
        )
    return listed_items(given, field, read)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)
