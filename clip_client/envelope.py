"""`Requests` and `Responses`, written from their parts.

Each is one repeated field, and protobuf's encoding lets the elements of such a field follow each
other. To add a message to an envelope message would copy it, and to ask for its size would
serialize it once more: for embeddings of 100 kB and more that is most of what a server does.
"""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import Message

# A message is closed once it has so many bytes: larger ones were slower.
MESSAGE_BYTES = 3_000_000
# Field 1, of as many bytes as the number behind it says.
_TAG = b"\x0a"


def enveloped(messages: Iterator[Message]) -> bytes:
    """The envelope of as many messages as it takes, of which the first is always one."""
    parts: list[bytes] = []
    size = 0
    while size < MESSAGE_BYTES and (message := next(messages, None)) is not None:
        content = message.SerializeToString()
        parts += (_TAG, _varint(len(content)), content)
        size += len(content)
    return b"".join(parts)


def _varint(number: int) -> bytes:
    """In base 128, the lowest digit first, with a bit that says whether another follows."""
    digits = bytearray()
    while number >= 128:
        digits.append(number % 128 + 128)
        number //= 128
    digits.append(number)
    return bytes(digits)
