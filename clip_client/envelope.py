"""Serializes `Requests` and `Responses` from their parts.

Each is one repeated field, whose elements protobuf encodes one after the other. Adding a message
to an envelope message would copy it, and asking for its size would serialize it once more: for
embeddings of 100 kB and more that is most of a server's work.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

# An envelope is full at this size: larger ones were slower.
MESSAGE_BYTES = 3_000_000
# Field 1, length-delimited.
_TAG = b"\x0a"


def serialize_messages(messages: Iterator[Message]) -> bytes:
    """Serializes messages into one envelope until it is full, and at least one of them."""
    parts: list[bytes] = []
    size = 0
    while size < MESSAGE_BYTES and (message := next(messages, None)) is not None:
        content = message.SerializeToString()
        parts += (_TAG, _varint(len(content)), content)
        size += len(content)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """Encodes a number as protobuf does: base 128, lowest digit first, with a continuation bit."""
    digits = bytearray()
    while number >= 128:
        digits.append(number % 128 + 128)
        number //= 128
    digits.append(number)
    return bytes(digits)
