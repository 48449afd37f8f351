"""Picture bytes to pixels, equal to open_clip's inference transform or faster."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from io import BytesIO
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, features

from clip_server.errors import ItemError
from clip_server.install import install_hint
from clip_server.model_card import Crop, ImageSpec
from clip_server.preprocess.metadata import without_metadata

# A phone's largest photos have 108 million pixels; decoded, this many take 400 MB.
MAX_PIXELS = 2**27
# What may be opened, by Pillow's names and by people's: no format that runs programs (EPS),
# holds documents (PDF), or wraps a picture whose size is not known beforehand (ICO, ICNS).
_FORMATS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "GIF": "GIF",
    "BMP": "BMP",
    "TIFF": "TIFF",
    "AVIF": "AVIF",
    "HEIF": "HEIC",
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Decoding smaller than this saves little, and shows most in models of small pictures.
_LEAST_DRAFT = 448
# The source pixels of bicubic beside an enlarged pixel, and one for the fraction.
_NEIGHBOURS = 3
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
# What the container that begins with `ftyp` holds, by its brand; any other is video. HEIC and
# AVIF may both be `mif1`.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"), "HEIF"),
}

Size: TypeAlias = tuple[int, int]
# Left, top, right and bottom, in pixels and parts of them.
Box: TypeAlias = tuple[float, float, float, float]


class ImageTransform:
    """Pictures to the square of pixels a model takes. Safe to call from several threads.

    exact: equal to open_clip's transform to the pixel; else a JPEG of at least twice the size
        needed is decoded at a fraction of its size, several times faster.
    max_pixels: a larger picture is refused before it is decoded. Of a thin one that the model
        would enlarge beyond this, only the centre is made, within rounding of the exact one.
    """

    def __init__(self, spec: ImageSpec, exact: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        self.spec, self.exact, self.max_pixels = spec, exact, max_pixels
        _quieten_pillow()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Encoded picture to RGB pixels, [3, S, S] uint8; of an animation the first frame.

        As in CLIP, the EXIF orientation is not applied and transparency is dropped.

        Raises:
            ItemError: not a picture of a format in `readable_formats`, damaged, or too large.
        """
        image = self._open(data)
        try:
            pixels = np.asarray(self._square(image))
        except Exception as error:  # on damaged data a decoder may raise anything
            raise _undecodable(image.format, error) from error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _open(self, data: bytes) -> Image.Image:
        try:
            image = Image.open(BytesIO(without_metadata(data)), formats=readable_formats())
            width, height = _largest_part(image)
        except UnidentifiedImageError:
            raise _unreadable(data) from None
        except Exception as error:  # a header may be damaged in any way
            raise _undecodable("image", error) from error
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
        box = self._decode(image)
        if image.mode == "I;16B":  # Pillow's resize would mix the bytes of its values
            image = image.convert("I").convert("I;16")
        if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
            image = image.convert("RGB")  # the same pixels come of it, in less time
        if self.spec.resize == "squash":
            return _rgb(self._resize(image, (size, size), box))
        # open_clip truncates the longer side, and so does transformers.
        short = min(width, height)
        wide, high = size * width // short, size * height // short
        left, top = (_half(side - size, self.spec.crop) for side in (wide, high))
        if wide * high <= self.max_pixels:
            image = self._resize(image, (wide, high), box)
            return _rgb(image.crop((left, top, left + size, top + size)))
        # A very thin image, enlarged: only its centre is made. Pillow holds a box in single
        # precision, so the centre is cut out first, and the box's numbers stay small.
        across, down = box[2] / wide, box[3] / high
        centre = (left * across, top * down, (left + size) * across, (top + size) * down)
        image, centre = _cut_out(image, centre)
        return _rgb(self._resize(image, (size, size), centre))

    def _decode(self, image: Image.Image) -> Box:
        """Decodes a picture in place, a JPEG at a fraction of its size; where in it the
        picture lies: an odd side ends within its last pixel."""
        scaled = None
        if not self.exact:
            # Leaves at least twice the target, so that the resize still has to smooth.
            least = max(2 * self.spec.size, _LEAST_DRAFT)
            scaled = image.draft(None, (least, least))
        image.load()
        return scaled[1] if scaled else (0, 0, *image.size)

    def _resize(self, image: Image.Image, size: Size, box: Box) -> Image.Image:
        return image.resize(size, _FILTERS[self.spec.interpolation], box)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here: HEIC needs a package of its own."""
    missing = set()
    if not features.check("avif"):
        missing.add("AVIF")
    try:
        import pillow_heif
    except ImportError:
        missing.add("HEIF")
    else:
        # The pool's threads are enough; a thumbnail in the file may differ from the picture.
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return tuple(name for name in _FORMATS if name not in missing)


def _largest_part(image: Image.Image) -> Size:
    """Of what is decoded at once: the picture, or a tile that a TIFF claims is larger."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    tags = image.tag_v2
    tile = (tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0))
    return max(image.size, tile, key=lambda size: size[0] * size[1])


def _half(rest: int, crop: Crop) -> int:
    return round(rest / 2) if crop == "round" else rest // 2


def _cut_out(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """The part of an image that resizing a box of it reads, and the box within that part."""
    x, y = (max(0, int(edge) - _NEIGHBOURS) for edge in box[:2])
    right, bottom = (
        min(side, int(edge) + 1 + _NEIGHBOURS)
        for side, edge in zip(image.size, box[2:], strict=True)
    )
    within = (box[0] - x, box[1] - y, min(box[2], right) - x, min(box[3], bottom) - y)
    return image.crop((x, y, right, bottom)), within


def _rgb(image: Image.Image) -> Image.Image:
    # Pillow warns of a palette's transparency, which RGB has no place for.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _unreadable(data: bytes) -> ItemError:
    kind = _container(data)
    if kind in _FORMATS and kind not in readable_formats():
        command = install_hint("heif") if kind == "HEIF" else "pip install --upgrade pillow"
        return ItemError(
            f"the server cannot read {_FORMATS[kind]} images; on its machine: {command}"
        )
    *names, last = (_FORMATS[name] for name in readable_formats())
    return ItemError(
        f"{_described(data)} is not an image the server can read; {', '.join(names)} and {last} are"
    )


def _described(data: bytes) -> str:
    if not data:
        return "an empty file"
    head = data[:64]
    for start, kind in _MISTAKES.items():
        if head.lstrip().lower().startswith(start.lower()):
            return kind
    container = _container(data)
    if container:
        return f"the start of {_FORMATS[container]}" if container in _FORMATS else "a video file"
    printable = all(byte >= 0x20 or byte in b"\t\r\n" for byte in head)
    return "text" if printable else f"a file of {len(data):,} bytes"


def _container(data: bytes) -> str | None:
    """HEIF, AVIF or video: they share a container, whose brand tells them apart."""
    if data[4:8] != b"ftyp":
        return None
    return _BRANDS.get(data[8:12], "video")


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
