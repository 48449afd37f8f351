"""Removes the metadata of PNG and JPEG files before they are decoded.

Texts, comments, previews, EXIF and colour profiles do not affect an embedding. But Pillow inflates
and parses them when it opens an image, and rejects images whose metadata is damaged or larger than
it allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# JPEG markers: application segments and comments are removed, except those of JFIF and Adobe,
# which say how colours are stored.
_SEGMENTS = range(0xC0, 0xFF)
_REMOVED = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_START_OF_SCAN = 0xDA


def without_metadata(data: bytes) -> bytes:
    """Returns a PNG or JPEG with only what its pixels need; other formats unchanged."""
    if data.startswith(PNG_SIGNATURE):
        removed = _png_metadata(data)
    elif data.startswith(_JPEG):
        removed = _jpeg_metadata(data)
    else:
        return data
    view, kept, position = memoryview(data), BytesIO(), 0
    for start, end in removed:
        kept.write(view[position:start])
        position = end
    kept.write(view[position:])
    return kept.getvalue()


def _png_metadata(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each ancillary chunk, except a palette's transparency."""
    end = len(PNG_SIGNATURE)
    while end < len(data):
        start = end
        name = data[start + 4 : start + 8]
        end += 12 + int.from_bytes(data[start : start + 4], "big")
        if end <= len(data) and name[:1].islower() and name != b"tRNS":
            yield start, end


def _jpeg_metadata(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each segment to remove, among those before the pixels."""
    end = 2
    while end + 4 <= len(data) and data[end] == 0xFF:
        start, marker = end, data[end + 1]
        if marker == 0xFF:  # padding
            end += 1
            continue
        end += 2 + (data[start + 2] << 8 | data[start + 3])
        if marker not in _SEGMENTS or marker == _START_OF_SCAN or end > len(data):
            return
        if marker in _REMOVED:
            yield start, end
