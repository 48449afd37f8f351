"""Picture bytes to pixels, equal to open_clip's inference transform or faster."""

from __future__ import annotations

import logging
import warnings
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from clip_server.errors import ItemError
from clip_server.models.card import ImageSpec

# What Pillow may open here: no format that runs programs (EPS) or holds documents (PDF).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# A phone's largest photos have 108 million pixels; decoded, this many take 400 MB.
MAX_PIXELS = 2**27
# Decoding smaller than this saves little, and shows most in models of small pictures.
_LEAST_DRAFT = 448
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Beyond this the whole resized picture is not made to crop its centre, but the centre only.
_MAX_RESIZED = 2**24
# First bytes of what people send by mistake.
_MISTAKES = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML or SVG file",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"data:": "a data URI that was not decoded",
    b"\xff\xd8": "the start of a JPEG",
    b"\x89PNG": "the start of a PNG",
}


class ImageTransform:
    """Pictures to the square of pixels a model takes. Safe to call from several threads.

    exact: equal to open_clip's transform to the pixel; else a JPEG of at least twice the size
        needed is decoded at a fraction of its size, several times faster.
    max_pixels: a larger picture is refused before it is decoded.
    """

    def __init__(self, spec: ImageSpec, exact: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        self.spec, self.exact, self.max_pixels = spec, exact, max_pixels
        _quieten_pillow()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Encoded picture to RGB pixels, [3, S, S] uint8; of an animation the first frame.

        As in CLIP, the EXIF orientation is not applied and transparency is dropped.

        Raises:
            ItemError: not a picture of a format in `FORMATS`, damaged, or too large.
        """
        image = self._open(data)
        try:
            if not self.exact:
                # Leaves at least twice the target, so that the resize still has to smooth.
                least = max(2 * self.spec.size, _LEAST_DRAFT)
                image.draft(None, (least, least))
            pixels = np.asarray(self._square(image))
        except Exception as error:  # on damaged data a decoder may raise anything
            raise _undecodable(image.format, error) from error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _open(self, data: bytes) -> Image.Image:
        try:
            image = Image.open(BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise _unreadable(data) from None
        except Exception as error:  # a header may be damaged in any way
            raise _undecodable("image", error) from error
        width, height = image.size
        if width * height > self.max_pixels:
            raise ItemError(
                f"the image has {width} x {height} = {width * height:,} pixels; "
                f"at most {self.max_pixels:,} are accepted"
            )
        return image

    def _square(self, image: Image.Image) -> Image.Image:
        """Resized and cropped in its own colour mode, then RGB, in open_clip's order."""
        size = self.spec.size
        width, height = image.size
        if self.spec.resize == "squash":
            return _rgb(self._resized(image, (size, size)))
        # open_clip truncates the longer side, and rounds where the crop begins.
        short = min(width, height)
        wide, high = size * width // short, size * height // short
        left, top = round((wide - size) / 2), round((high - size) / 2)
        if wide * high <= _MAX_RESIZED:
            image = self._resized(image, (wide, high))
            image = image.crop((left, top, left + size, top + size))
        else:
            across, down = width / wide, height / high
            box = (left * across, top * down, (left + size) * across, (top + size) * down)
            image = self._resized(image, (size, size), box)
        return _rgb(image)

    def _resized(
        self,
        image: Image.Image,
        size: tuple[int, int],
        box: tuple[float, float, float, float] | None = None,
    ) -> Image.Image:
        return image.resize(size, _FILTERS[self.spec.interpolation], box)


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow warns of a palette's transparency, which RGB has no place for.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _unreadable(data: bytes) -> ItemError:
    return ItemError(
        f"{_described(data)} is not an image the server can read; "
        "JPEG, PNG, WebP, GIF, BMP and TIFF are"
    )


def _described(data: bytes) -> str:
    if not data:
        return "an empty file"
    head = data[:64]
    for start, kind in _MISTAKES.items():
        if head.lstrip().lower().startswith(start.lower()):
            return kind
    if b"ftyp" in head[4:8]:
        return "a HEIC, AVIF or video file"
    printable = all(byte >= 0x20 or byte in b"\t\r\n" for byte in head)
    return "text" if printable else f"a file of {len(data):,} bytes"


def _undecodable(kind: str | None, error: Exception) -> ItemError:
    cut = isinstance(error, EOFError) or "truncated" in str(error)
    what = "ends too early: it is cut off" if cut else "is damaged and cannot be decoded"
    return ItemError(f"the {kind or 'image'} data {what}; send the whole file again")


def _quieten_pillow() -> None:
    """Keeps Pillow's remarks on odd files off a server's terminal.

    Size is checked here, per transform and with an error, so Pillow's own limit is lifted.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
