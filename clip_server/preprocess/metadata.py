"""What a PNG or JPEG carries beside its pixels, removed before it is decoded.

Texts, comments, previews, EXIF and colour profiles change no pixel of an embedding. Yet Pillow
inflates and parses them when it opens an image, and gives up on the image where they are larger
than it allows, or damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Markers of JPEG: the application's segments and comments go, but for those of JFIF and Adobe,
# which say how the colours are stored.
_SEGMENTS = range(0xC0, 0xFF)
_REMOVED = {*range(0xE1, 0xF0), 0xFE} - {0xEE}
_START_OF_SCAN = 0xDA


def without_metadata(data: bytes) -> bytes:
    """The image with only what its pixels need. Other formats, and what is cut off, as they are."""
    if data.startswith(_PNG):
        removed = _of_png(data)
    elif data.startswith(_JPEG):
        removed = _of_jpeg(data)
    else:
        return data
    view, kept, here = memoryview(data), BytesIO(), 0
    for start, end in removed:
        kept.write(view[here:start])
        here = end
    kept.write(view[here:])
    return kept.getvalue()


def _of_png(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the chunks are that a reader may skip, but for a palette's transparency."""
    end = len(_PNG)
    while end < len(data):
        start = end
        name = data[start + 4 : start + 8]
        end += 12 + int.from_bytes(data[start : start + 4], "big")
        if end <= len(data) and name[:1].islower() and name != b"tRNS":
            yield start, end


def _of_jpeg(data: bytes) -> Iterator[tuple[int, int]]:
    """Where the removed segments are, among those before the pixels."""
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
