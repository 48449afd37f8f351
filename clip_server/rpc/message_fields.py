"""Counts the fields of protobuf messages before they are parsed.

An empty item has two bytes, and its object a hundred: without a limit, a small compressed message
would fill the memory, and nothing else would be answered while its items are looked at.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from clip_server.errors import RequestError

# Shorter messages are not counted: they cannot hold very many.
_SHORT_BYTES = 1 << 20
_MOST_FIELDS = 1_000_000
_MOST_VARINT_BYTES = 10
# Types on the wire, and the bytes of those of a fixed size; groups have their fields in between.
_VARINT, _LENGTH_DELIMITED = 0, 2
_SIZES = {1: 8, 3: 0, 4: 0, 5: 4}


def refuse_many_fields(message: bytes, descriptor: Any) -> None:
    """Raises RequestError if a serialized message has more fields than the server reads.

    descriptor: of its form, by which messages in it are found. What is no such message is left to
        its parser.
    """
    if len(message) > _SHORT_BYTES and _has_many(message, descriptor):
        raise RequestError(
            f"the message has more than {_MOST_FIELDS:,} fields, the most the server reads: send "
            "fewer items in one"
        )


def _has_many(message: bytes, descriptor: Any) -> bool:
    count = 0
    waiting = [(0, len(message), descriptor)]
    while waiting:
        place, end, form = waiting.pop()
        forms = _messages_in(form)
        while place < end:
            count += 1
            if count > _MOST_FIELDS:
                return True
            try:
                key, place = _varint(message, place)
                wire_type = key & 7
                if wire_type == _LENGTH_DELIMITED:
                    size, place = _varint(message, place)
                    if size and (inner := forms.get(key >> 3)):
                        waiting.append((place, min(place + size, end), inner))
                    place += size
                elif wire_type == _VARINT:
                    _, place = _varint(message, place)
                else:
                    place += _SIZES[wire_type]
            except (IndexError, KeyError, ValueError):
                return False
    return False


@cache
def _messages_in(descriptor: Any) -> dict[int, Any]:
    """The forms of the messages in a message, by the numbers of their fields."""
    return {field.number: field.message_type for field in descriptor.fields if field.message_type}


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The number at a place, and the place after it."""
    number = message[place]
    if number < 128:
        return number, place + 1
    number &= 127
    for index in range(1, _MOST_VARINT_BYTES):
        byte = message[place + index]
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, place + index + 1
    raise ValueError
