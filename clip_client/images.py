"""Arrays as PIL images, and these as bytes that the server decodes to the same pixels."""

from __future__ import annotations

import sys
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clip_client.errors import InvalidInputError

# The server's default limit of one item.
MAX_ITEM_BYTES = 32 * 2**20
# Formats that keep a mode and its pixels, as the server resizes an image in its own mode.
_PNG = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
_TIFF = {"PA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16B"}
# Modes that no file has, and those that files of such pixels open in.
_FILE_MODES = {"La": "LA", "RGBa": "RGBA"}
_SAME_BYTES = {"I;16L": "I;16", "I;16N": "I;16" if sys.byteorder == "little" else "I;16B"}
_DEEP = {"I", "F", "I;16", "I;16B"}
_MAX_JPEG_SIDE = 65_500
# How far a float may be out of the range of its values, by rounding.
_TOLERANCE = 1e-3


def of_array(array: NDArray[Any]) -> Any:
    """A PIL image of an array, which it copies.

    array: [H, W], grey, or [H, W, C] with 1 to 4 channels: grey, grey and alpha, RGB, RGBA. The
        values are 0 to 255, bool, or floats of 0 to 1. Floats above 1 are truncated, as Pillow
        does it.

    Raises InvalidInputError for another shape, type or range, and without Pillow.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise InvalidInputError(
            f"an array of {array.dtype} and shape {array.shape} is no image: pass numbers of "
            f"shape (H, W), (H, W, 1), (H, W, 2), (H, W, 3) or (H, W, 4): grey, RGB, each with "
            f"alpha or not{_advice(array)}"
        )
    if not array.size:
        raise InvalidInputError(f"an array of shape {array.shape} has no pixels")
    try:
        from PIL import Image
    except ImportError:
        raise InvalidInputError("images in arrays need Pillow: pip install pillow") from None
    is_mask = array.dtype == np.bool_ and array.ndim == 2
    shape = array.shape[:2] if channels == 1 else array.shape
    return Image.fromarray((array.copy() if is_mask else _bytes(array)).reshape(shape))


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A copy of an array of numbers, as uint8."""
    if array.dtype == np.bool_:
        array = array * 255
    pixels: NDArray[np.uint8] = _of_0_to_255(array).astype(np.uint8)
    return pixels


def _of_0_to_255(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype == np.uint8:
        return array
    least, most = array.min(), array.max()
    # Also false for NaN.
    if not (least >= -_TOLERANCE and most <= 255 + _TOLERANCE):
        raise InvalidInputError(
            f"an array of {array.dtype} with values from {least:.6g} to {most:.6g} is no image: "
            "pass values of 0 to 255, or floats of 0 to 1"
        )
    if array.dtype.kind == "f" and most <= 1 + _TOLERANCE:
        array = np.rint(array * 255)
    clipped: NDArray[Any] = np.clip(array, 0, 255)
    return clipped


def _advice(array: NDArray[Any]) -> str:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4):
        return "; this one has its channels first: pass array.transpose(1, 2, 0)"
    return ""


def undecoded(image: Any) -> bytes | None:
    """The JPEG file that a PIL image was opened from, where it is not decoded yet.

    The server may decode a JPEG at a fraction of its size: from its file it gets the same
    embedding in every way it is passed, and sooner.
    """
    file = getattr(image, "fp", None)
    is_jpeg = getattr(image, "format", None) in ("JPEG", "MPO") and image.tell() == 0
    if not is_jpeg or file is None or not image.tile:
        return None
    from PIL import Image

    place = file.tell()
    file.seek(0)
    content: bytes = file.read()
    file.seek(place)
    with Image.open(BytesIO(content)) as opened:
        # `draft` changes them.
        is_same = (opened.format, opened.mode, opened.size) == (
            image.format,
            image.mode,
            image.size,
        )
    return content if is_same and len(content) <= MAX_ITEM_BYTES else None


def encode(image: Any) -> bytes:
    """A PIL image as PNG or TIFF, which lose nothing; where that is larger than the server takes,
    as a JPEG of high quality, or at a fraction of its size if it has more than 8 bits. Changes
    `image`."""
    # Neither colour profiles nor transparent colours are applied to files.
    image.info = {}
    if image.mode in _SAME_BYTES:
        image = _of_mode(image, _SAME_BYTES[image.mode])
    elif image.mode not in _PNG | _TIFF:
        image = image.convert(_FILE_MODES.get(image.mode, "RGB"))
    if image.mode in _TIFF:
        content = _saved(image, "TIFF")
    else:
        # A palette may list fewer colours than the pixels use.
        palette = {"bits": 8} if image.mode == "P" else {}
        content = _saved(image, "PNG", compress_level=1, **palette)
    if len(content) <= MAX_ITEM_BYTES:
        return content
    return _reduced(image) if image.mode in _DEEP else _jpeg(image)


def _of_mode(image: Any, mode: str) -> Any:
    from PIL import Image

    return Image.frombytes(mode, image.size, image.tobytes())


def _reduced(image: Any) -> bytes:
    # The server clips values only after it has resized.
    image = image.convert("F")
    factor = 1
    while len(content := _saved(image.reduce(factor), "TIFF")) > MAX_ITEM_BYTES:
        factor += 1
    return content


def _jpeg(image: Any) -> bytes:
    if image.mode in ("LA", "PA", "RGBA"):
        # Resizing leaves black where nothing is opaque, and so does this.
        image = image.convert("RGBA").convert("RGBa").convert("RGBA")
    image = image.convert("RGB")
    image = image.reduce(-(-max(image.size) // _MAX_JPEG_SIDE))
    for quality in (95, 85, 70):
        content = _saved(image, "JPEG", quality=quality, subsampling=0)
        if len(content) <= MAX_ITEM_BYTES:
            break
    return content


def _saved(image: Any, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
