"""Entries of `data` in JSON bodies: their contents, their faults, and what comes back of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import getrandbits
from typing import Any

from clip_client.data_uri import decode_base64, has_scheme, is_data_uri
from clip_client.proto import clip_pb2 as pb
from clip_server.errors import RequestError
from clip_server.gateway import json_text

# The fields that may hold a content, the first first: clients that read an image themselves send
# the uri they read it from as well.
_CONTENTS = ("text", "blob", "image", "uri")
# The fields that may hold further entries, by their steps in an access path.
_BELOW = {"c": "chunks", "m": "matches"}
# How deep entries may lie in one another.
_MOST_LEVELS = 20
# The media type of a `data:` URI that is not one of images, or is absent: the encoder would take
# the content for a text, while in a field for images it is an image all the same.
_OTHER_TYPE = re.compile(r"\A\s*data:(?!image/|base64)[^;,]{0,127}(?=[;,])", re.IGNORECASE)
_LONGEST_ID = 1024
# The longest uri that comes back where no one asked for it: an image's bytes are in longer ones.
_LONGEST_URI = 1024


def to_item(entry: Any) -> pb.Item:
    """The item in an entry; without any content one that is empty, an error of that item alone."""
    fields = _fields(entry)
    given = [key for key in _CONTENTS if isinstance(fields.get(key), str)]
    # Clients with a fixed set of fields leave empty those that do not apply.
    filled = [key for key in given if fields[key].strip()]
    for key in filled or given:
        return read_content(key, fields[key])
    return pb.Item()


def _fields(entry: Any) -> Mapping[str, Any]:
    """The fields of an entry, which may be a string: a `data:` URI or a text."""
    if isinstance(entry, str):
        return {"uri": entry} if is_data_uri(entry) else {"text": entry}
    return entry if isinstance(entry, Mapping) else {}


def read_content(key: str, value: str) -> pb.Item:
    """The item in one of the fields text, uri, blob and image of an entry."""
    if key == "text":
        return pb.Item(text=value)
    if key == "uri":
        return pb.Item(uri=value)
    if has_scheme(value):
        return pb.Item(uri=_OTHER_TYPE.sub("data:image/any", value))
    try:
        return pb.Item(image=decode_base64(value))
    except ValueError:
        return pb.Item(uri="data:image/*;base64,!")  # the encoder says what is wrong


def to_items(entries: Iterable[Any]) -> tuple[list[pb.Item], dict[int, str]]:
    """The items in entries, and why those that are unfit are not among them, by index."""
    items, unfit = [], {}
    for index, entry in enumerate(entries):
        why = find_fault(entry)
        if why:
            unfit[index] = why
        items.append(pb.Item() if why else to_item(entry))
    return items, unfit


def encode_request(
    items: Iterable[pb.Item], model: str, normalize: bool, minibatch_size: int = 0
) -> pb.Request:
    """The request to encode items. It is filled in place: messages put into others are copied."""
    request = pb.Request()
    encode = request.encode
    encode.SetInParent()
    encode.items.extend(items)
    encode.model = model
    encode.options.normalize, encode.options.minibatch_size = normalize, minibatch_size
    return request


def find_fault(entry: Any) -> str | None:
    """Why an entry cannot be answered, whatever its content is; None: it can."""
    if isinstance(entry, str):
        return _find_fault_in_text("text", entry)
    if not isinstance(entry, Mapping):
        return None
    for key in _CONTENTS:
        if isinstance(entry.get(key), str) and (why := _find_fault_in_text(key, entry[key])):
            return why
    return _find_fault_in_id(entry.get("id")) or _find_fault_in_tags(entry.get("tags"))


def _find_fault_in_id(value: Any) -> str | None:
    is_scalar = value is None or isinstance(value, (str, int, float))
    if not is_scalar or isinstance(value, bool) or len(str(value)) > _LONGEST_ID:
        return f"the id is not a string or a number of at most {_LONGEST_ID:,} characters"
    return _find_fault_in_text("id", str(value))


def _find_fault_in_tags(tags: Any) -> str | None:
    if tags is not None and not isinstance(tags, dict):
        return 'the tags are not an object like {"colour": "red"}'
    if json_text.is_nested(tags or {}):
        return f"the tags are nested more than {json_text.MOST_NESTED} deep"
    return None


def _find_fault_in_text(field: str, text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return (
            f"the {field} is not valid Unicode at character {error.start}: half of a surrogate "
            "pair, or a byte that is not UTF-8; send the whole character"
        )
    return None


def echo(entry: Any, drop_image_content: bool | None, level: int = 0) -> dict[str, Any]:
    """The part of an entry that is sent back with its result, entries below it included.

    drop_image_content: True: nothing of an image; False: all of it; None: a short uri at most.

    Raises:
        RequestError: entries lie too deep in one another.
    """
    fields = _fields(entry)
    kept: dict[str, Any] = {"id": fields.get("id")}
    if kept["id"] is None or _find_fault_in_id(kept["id"]):
        kept["id"] = f"{getrandbits(128):032x}"
    if isinstance(fields.get("text"), str):
        kept["text"] = fields["text"]
    if "tags" in fields and not _find_fault_in_tags(fields["tags"]):
        kept["tags"] = fields["tags"]
    kept |= {key: fields[key] for key in _kept_images(fields, drop_image_content)}
    for key in _BELOW.values():
        below = fields.get(key)
        if isinstance(below, list):
            if level == _MOST_LEVELS:
                raise RequestError(f"chunks and matches are nested more than {level} levels deep")
            kept[key] = [echo(each, drop_image_content, level + 1) for each in below]
    return kept


def _kept_images(fields: Mapping[str, Any], drop_image_content: bool | None) -> Iterator[str]:
    """The names of the fields with images that come back."""
    if drop_image_content:
        return
    for key in ("uri", "blob", "image") if drop_image_content is False else ("uri",):
        value = fields.get(key)
        if isinstance(value, str) and (drop_image_content is False or len(value) <= _LONGEST_URI):
            yield key


def descend(
    entries: Sequence[Any], echoes: Sequence[dict[str, Any]], paths: Iterable[str]
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The entries at the end of each path, each with what comes back of it.

    paths: steps from an entry: "" or "r" ends at itself, "cm" at the matches of its chunks.

    Raises:
        RequestError: chunks or matches on the way are no list.
    """
    for path in dict.fromkeys(paths):
        level = list(zip(entries, echoes, strict=True))
        for key in (_BELOW[step] for step in path if step in _BELOW):
            level = [pair for parent in level for pair in _pairs_below(*parent, key)]
        yield from level


def _pairs_below(
    entry: Any, echoed: dict[str, Any], key: str
) -> Iterator[tuple[Any, dict[str, Any]]]:
    below = _fields(entry).get(key)
    if below is None:
        return iter(())
    if not isinstance(below, list):
        raise RequestError(f'the {key} of an entry are not a list like [{{"text": "a cat"}}]')
    return zip(below, echoed[key], strict=True)
