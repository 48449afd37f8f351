"""Pictures to pixels: equal to open_clip where asked to be, and never broken by a bad file."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clip_server.errors import ItemError
from clip_server.models.card import ImageSpec
from clip_server.models.image import ImageTransform

SPEC = ImageSpec(64)


def photo(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth shapes in colour, with some noise: like a photo, and the same every time."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(8 * x + 3 * y), np.cos(11 * y - x), np.sin(15 * x * y)]
    noise = np.random.default_rng(0).normal(0, 0.05, (height, width, 3))
    return Image.fromarray((127 + 100 * (np.stack(waves, -1) + noise)).clip(0, 255).astype("u1"))


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sixteen_bit(kind: str) -> bytes:
    grey = np.asarray(photo().convert("L")).astype(np.uint16)
    return encoded(Image.fromarray(grey * 257), kind)


def animated(kind: str) -> bytes:
    return encoded(photo(), kind, save_all=True, append_images=[photo().rotate(90)])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: lying on its side
    return encoded(photo(), "JPEG", exif=exif)


def palette(**options: Any) -> bytes:
    return encoded(photo().convert("P"), "PNG", **options)


PICTURES: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} {mode}": lambda kind=kind, mode=mode: encoded(photo().convert(mode), kind)
        for kind, modes in {
            "JPEG": ["RGB", "L", "CMYK"],
            "PNG": ["RGB", "RGBA", "L", "LA", "P", "1"],
            "TIFF": ["RGB", "CMYK", "I", "F", "LAB", "1"],
            "WEBP": ["RGB", "RGBA"],
            "GIF": ["P", "L"],
            "BMP": ["RGB", "P", "1"],
        }.items()
        for mode in modes
    },
    "JPEG progressive": lambda: encoded(photo(), "JPEG", progressive=True),
    "JPEG with an orientation": turned,
    "PNG 16 bit": lambda: sixteen_bit("PNG"),
    "TIFF 16 bit": lambda: sixteen_bit("TIFF"),
    "PNG palette with a transparent entry": lambda: palette(transparency=3),
    "PNG palette with alphas": lambda: palette(transparency=bytes(range(256))),
    "PNG with a transparent colour": lambda: encoded(photo(), "PNG", transparency=(1, 2, 3)),
    "GIF animated": lambda: animated("GIF"),
    "WEBP animated": lambda: animated("WEBP"),
    "PNG animated": lambda: animated("PNG"),
    **{
        f"{width} x {height}": lambda width=width, height=height: encoded(
            noise(width, height), "PNG"
        )
        for width, height in [(1, 1), (2, 3), (64, 64), (65, 64), (301, 777), (900, 1), (1, 900)]
    },
}


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [64, 224])
def test_exact_equals_open_clip_to_the_pixel(size: int, resize: Any) -> None:
    pytest.importorskip("open_clip")
    transform = ImageTransform(ImageSpec(size, resize=resize), exact=True)
    for name, picture in PICTURES.items():
        found, expected = transform(picture()), open_clip_pixels(picture(), size, resize)
        np.testing.assert_array_equal(found, expected, err_msg=name)


def open_clip_pixels(data: bytes, size: int, resize: str) -> NDArray[np.uint8]:
    """What open_clip's transform makes of a picture, before it normalises."""
    from open_clip import image_transform

    transform = image_transform(
        size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of transparency
        scaled = transform(Image.open(io.BytesIO(data))).numpy()
    pixels: NDArray[np.uint8] = (scaled * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_gives_pixels(name: str) -> None:
    pixels = ImageTransform(SPEC)(PICTURES[name]())
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_scaled_decoding_of_a_jpeg_is_close_to_exact() -> None:
    data = encoded(photo(1600, 1200), "JPEG", quality=90)
    fast, exact = ImageTransform(SPEC)(data), ImageTransform(SPEC, exact=True)(data)
    assert 0 < np.abs(fast.astype(int) - exact).mean() < 1


def test_a_jpeg_under_twice_the_size_is_decoded_whole() -> None:
    data = encoded(photo(250, 127 * 2), "JPEG")
    fast, exact = ImageTransform(ImageSpec(126)), ImageTransform(ImageSpec(126), exact=True)
    np.testing.assert_array_equal(fast(data), exact(data))


@pytest.mark.parametrize(("width", "height"), [(100_000, 1), (1, 100_000)])
def test_a_thin_picture_is_not_blown_up(width: int, height: int) -> None:
    ramp = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
    pixels = ImageTransform(SPEC)(encoded(Image.fromarray(ramp), "PNG"))
    assert pixels.shape == (3, 64, 64)
    # Only the centre is made, from the one or two pixels that are there.
    assert set(pixels.flat) <= {127, 128}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"just a sentence", "text is not an image"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "text is not an image"),
        (b"data:image/png;base64,iVBORw0KGgo=", "a data URI"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "HEIC"),
        (b"\x00" * 100, "100 bytes"),
    ],
)
def test_what_is_not_a_picture_is_an_item_error(data: bytes, message: str) -> None:
    with pytest.raises(ItemError, match=message) as caught:
        ImageTransform(SPEC)(data)
    assert "JPEG, PNG, WebP, GIF, BMP and TIFF" in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_off_picture_is_an_item_error(kind: str) -> None:
    data = encoded(photo(), kind)
    for part in (10, 40, len(data) // 2):
        with pytest.raises(ItemError) as caught:
            ImageTransform(SPEC)(data[:part])
        assert "0x" not in str(caught.value)
        assert "PIL" not in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    # The header of a PNG says 30,000 x 20,000; there is nothing behind it to decode.
    header = bytearray(encoded(photo(), "PNG"))
    header[16:24] = (30_000).to_bytes(4, "big") + (20_000).to_bytes(4, "big")
    header[29:33] = crc_of_header(bytes(header))
    with pytest.raises(ItemError, match="30000 x 20000 = 600,000,000 pixels; at most 134,217,728"):
        ImageTransform(SPEC)(bytes(header))
    with pytest.raises(ItemError, match="at most 1,000"):
        ImageTransform(SPEC, max_pixels=1000)(encoded(photo(), "JPEG"))


def crc_of_header(png: bytes) -> bytes:
    import zlib

    return zlib.crc32(png[12:29]).to_bytes(4, "big")


def test_damaged_pictures_only_ever_raise_item_errors(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        transform = ImageTransform(SPEC)
        for data in [picture() for picture in PICTURES.values()] * 20:
            damaged = np.frombuffer(data, dtype=np.uint8).copy()
            places = rng.integers(0, min(len(data), 1000), size=rng.integers(1, 20))
            damaged[places] = rng.integers(0, 256, size=len(places))
            with contextlib.suppress(ItemError):
                transform(damaged.tobytes())
    assert not caplog.records


def test_threads_share_a_transform() -> None:
    transform = ImageTransform(SPEC)
    files = [picture() for picture in PICTURES.values()]
    alone = [transform(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(transform, files), strict=True):
            np.testing.assert_array_equal(found, expected)
