"""Decodes and resizes images: equal to open_clip's inference transform, or faster."""

from __future__ import annotations

import logging
import math
import threading
import warnings
from contextlib import nullcontext
from functools import cache
from io import BytesIO
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features
from PIL.BmpImagePlugin import DibImageFile
from PIL.IcoImagePlugin import IcoFile

from clip_server.errors import ItemError
from clip_server.install import install_hint
from clip_server.model_card import Crop, ImageSpec
from clip_server.preprocess.metadata import PNG_SIGNATURE, without_metadata

# A phone's largest photos have 108 million pixels. Pillow takes four bytes for each.
MAX_PIXELS = 2**27
# Formats that are opened, by Pillow's names and by the usual ones: none that runs programs (EPS) or
# holds documents (PDF).
_FORMATS = {
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "GIF": "GIF",
    "BMP": "BMP",
    "ICO": "ICO",
    "TIFF": "TIFF",
    "AVIF": "AVIF",
    "HEIF": "HEIC",
}
_ICON_SIGNATURE = b"\0\0\1\0"
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# Shortest side of a scaled decode: decoding smaller saves little, and affects models with small
# images most.
_MIN_DRAFT = 448
# Source pixels that bicubic reads on each side of an enlarged pixel, and one for the fraction.
_NEIGHBOURS = 3
# Pixels that one byte of data can hold at most, by the name of Pillow's decoder. An image that
# claims more is cut off, and memory for its pixels would be filled in vain.
_MAX_PIXELS_PER_BYTE = {
    "raw": 8,  # one bit each
    "zip": 8 * 1032,  # one bit each, in the longest runs of deflate
    "gif": 2**12,  # the longest string of LZW
    "jpeg": 8 * 64,  # a block of 8 x 8 for each bit
}
# Smaller images may claim what they like.
_CHECKED_PIXELS = 2**22
# Larger images are decoded one at a time, which bounds the memory that several take together.
_LARGE_PIXELS = 2**25
# Pillow allocates the pixels of larger images in blocks of this size, which malloc maps, and unmaps
# when they are freed. Blocks of the default size, 16 MiB, would stay in its heaps.
_BLOCK_BYTES = 64 << 20
# First bytes of what is often sent by mistake.
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
# Content of a file that starts with `ftyp`, by its brand; any other brand is video. HEIC and AVIF
# may both be `mif1`.
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"), "HEIF"),
}

Size: TypeAlias = tuple[int, int]
# Left, top, right and bottom, in fractional pixels.
Box: TypeAlias = tuple[float, float, float, float]


class ImageTransform:
    """Converts encoded images to a model's square of pixels. Safe to call from several threads.

    exact: equal to open_clip's transform to the pixel; else a JPEG of at least twice the size
        needed is decoded at a fraction of its size, several times faster.
    max_pixels: larger images are rejected before they are decoded. If the model would enlarge a
        thin image beyond this, only its centre is computed, within rounding of the exact one.
    """

    def __init__(self, spec: ImageSpec, exact: bool = False, max_pixels: int = MAX_PIXELS) -> None:
        self.spec, self.exact, self.max_pixels = spec, exact, max_pixels
        self._large_image = threading.Lock()
        _configure_pillow()

    def __call__(self, data: bytes) -> NDArray[np.uint8]:
        """Decodes an image to RGB pixels, [3, S, S] uint8; of an animation, the first frame.

        As in CLIP, the EXIF orientation is not applied and transparency is dropped.

        Raises:
            ItemError: not an image of a format in `readable_formats`, damaged, or too large.
        """
        image = self._open(data)
        is_large = image.width * image.height > _LARGE_PIXELS
        try:
            with self._large_image if is_large else nullcontext():
                pixels = np.asarray(self._square(image))
        except Exception as error:  # on damaged data a decoder may raise anything
            raise _undecodable(image.format, error) from error
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _open(self, data: bytes) -> Image.Image:
        try:
            image = _open_header(data)
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
        if _is_cut_off(image, len(data)):
            raise _undecodable(image.format, EOFError())
        return image if not isinstance(image, DibImageFile) else _decoded_icon(data)

    def _square(self, image: Image.Image) -> Image.Image:
        """Resizes and crops in the image's colour mode, then converts to RGB, as open_clip does."""
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
        # Of a very thin image that is enlarged, only the centre is computed. Pillow stores a box in
        # single precision, so the centre is cut out first, which keeps the numbers small.
        across, down = box[2] / wide, box[3] / high
        centre = (left * across, top * down, (left + size) * across, (top + size) * down)
        image, centre = _cut_out(image, centre)
        return _rgb(self._resize(image, (size, size), centre))

    def _decode(self, image: Image.Image) -> Box:
        """Decodes an image in place, a JPEG at a fraction of its size.

        Returns the box of the image within the decoded pixels: an odd side ends within the last.
        """
        scaled = None
        if not self.exact:
            # Leaves at least twice the target, so that the resize still has to smooth.
            shortest = max(2 * self.spec.size, _MIN_DRAFT)
            scaled = image.draft(None, (shortest, shortest))
        image.load()
        return scaled[1] if scaled else (0, 0, *image.size)

    def _resize(self, image: Image.Image, size: Size, box: Box) -> Image.Image:
        return image.resize(size, _FILTERS[self.spec.interpolation], box)


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that this installation can read: HEIC needs pillow-heif."""
    missing = set()
    if not features.check("avif"):
        missing.add("AVIF")
    try:
        import pillow_heif
    except ImportError:
        missing.add("HEIF")
    else:
        # One thread, as images are decoded in parallel already. A thumbnail in the file may differ
        # from the image.
        pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)
    return tuple(name for name in _FORMATS if name not in missing)


def _open_header(data: bytes) -> ImageFile.ImageFile:
    """Opens an image without decoding it; of an icon, its largest image, a PNG or a DIB."""
    if not data.startswith(_ICON_SIGNATURE):
        return Image.open(BytesIO(without_metadata(data)), formats=readable_formats())
    content = data[IcoFile(BytesIO(data)).entry[0].offset :]
    if content.startswith(PNG_SIGNATURE):
        return Image.open(BytesIO(without_metadata(content)), formats=["PNG"])
    return DibImageFile(BytesIO(content))


def _decoded_icon(data: bytes) -> Image.Image:
    """The largest image of an icon, a DIB, with its mask as the alpha channel."""
    try:
        return IcoFile(BytesIO(data)).frame(0)
    except Exception as error:  # on damaged data it may raise anything
        raise _undecodable("ICO", error) from error


def _is_cut_off(image: ImageFile.ImageFile, size: int) -> bool:
    """Whether `size` bytes cannot hold the pixels that the header claims."""
    if image.width * image.height <= _CHECKED_PIXELS:
        return False
    least = 0.0
    for tile in image.tile:
        left, top, right, bottom = tile.extents or (0, 0, 0, 0)
        pixels_per_byte = _MAX_PIXELS_PER_BYTE.get(tile.codec_name, math.inf)
        least += (right - left) * (bottom - top) / pixels_per_byte
    return least > size


def _largest_part(image: Image.Image) -> Size:
    """The size of what is decoded together: the image, or a tile that a TIFF claims is larger."""
    if isinstance(image, DibImageFile):  # of an icon: a mask of the same size follows the pixels
        return image.width, image.height // 2
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size
    tags = image.tag_v2
    tile = (tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0))
    return max(image.size, tile, key=lambda size: size[0] * size[1])


def _half(rest: int, crop: Crop) -> int:
    return round(rest / 2) if crop == "round" else rest // 2


def _cut_out(image: Image.Image, box: Box) -> tuple[Image.Image, Box]:
    """The part of an image that is read to resize a box of it, and the box within that part."""
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
    """HEIF, AVIF or video, which share a container and differ in its brand."""
    if data[4:8] != b"ftyp":
        return None
    return _BRANDS.get(data[8:12], "video")


def _undecodable(kind: str | None, error: Exception) -> ItemError:
    cut = isinstance(error, EOFError) or "truncated" in str(error)
    what = "ends too early: it is cut off" if cut else "is damaged and cannot be decoded"
    return ItemError(f"the {kind or 'image'} data {what}; send the whole file again")


def _configure_pillow() -> None:
    """Silences Pillow's warnings on odd files, and has it allocate in larger blocks.

    Sizes are checked here, per transform and with an error, so Pillow's own limit is lifted.
    """
    Image.MAX_IMAGE_PIXELS = None
    Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
