"""Images to pixels: equal to open_clip where asked to be, and never broken by a bad file."""

from __future__ import annotations

import contextlib
import io
import logging
import struct
import sys
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import psutil
import pytest
from conftest import Start, eventually, flow, saved
from numpy.typing import NDArray
from PIL import Image

from clip_client import Client
from clip_server.errors import ItemError
from clip_server.model_card import ImageSpec
from clip_server.preprocess.image import ImageTransform, readable_formats

SPEC = ImageSpec(64)
FORMATS = readable_formats()


def photo(width: int = 300, height: int = 200) -> Image.Image:
    """Smooth shapes in colour, with some noise: like a photo, and the same every time."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(8 * x + 3 * y), np.cos(11 * y - x), np.sin(15 * x * y)]
    noise = np.random.default_rng(0).normal(0, 0.05, (height, width, 3))
    return Image.fromarray((127 + 100 * (np.stack(waves, -1) + noise)).clip(0, 255).astype("u1"))


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sixteen_bit_grey(kind: str) -> bytes:
    return saved(Image.fromarray(np.asarray(photo().convert("L")).astype(np.uint16) * 257), kind)


def sixteen_bit_colour() -> NDArray[np.uint16]:
    return np.asarray(photo()).astype(np.uint16) * 257


def sixteen_bit_png() -> bytes:
    values = sixteen_bit_colour()
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(name: bytes, content: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def sixteen_bit_tiff() -> bytes:
    values = sixteen_bit_colour()
    return tiff(values.shape[1], values.shape[0], values.astype("<u2").tobytes(), bits=16)


def tiff(width: int, height: int, data: bytes, bits: int = 8, tile: int = 0) -> bytes:
    """An RGB TIFF, in one strip or in square tiles compressed with zlib."""
    values = 150  # where in the file the data begins
    tags = {256: width, 257: height, 258: bits, 259: 8 if tile else 1, 262: 2, 277: 3}
    where = {322: tile, 323: tile, 324: values, 325: len(data)} if tile else {273: values}
    entries = [
        struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted({**tags, **where}.items())
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return (b"II*\0" + struct.pack("<I", 8) + directory).ljust(values, b"\0") + data


def icon(mode: str = "RGB", bitmap: str = "png") -> bytes:
    """Three sizes of one image, the largest of them 90 x 60."""
    image = transparent() if mode == "RGBA" else photo().convert(mode)
    sizes = [(16, 16), (90, 60), (32, 32)]
    return saved(image, "ICO", sizes=sizes, bitmap_format=bitmap)


def several(kind: str, **options: Any) -> bytes:
    """An animation, the pages of a TIFF, or the two images of a phone's MPO."""
    others = [photo().rotate(90)]
    return saved(photo(), kind, save_all=True, append_images=others, **options)


def turned(kind: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x112] = orientation
    return saved(photo(), kind, exif=exif)


def ycck() -> bytes:
    """As Photoshop writes CMYK: the file's Adobe segment says how its colours are kept."""
    data = bytearray(saved(photo().convert("CMYK"), "JPEG"))
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    return bytes(data)


def transparent(mode: str = "RGBA") -> Image.Image:
    image = photo().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def palette(**options: Any) -> bytes:
    return saved(photo().convert("P"), "PNG", **options)


SAMPLES: dict[str, Callable[[], bytes]] = {
    **{
        f"{kind} {mode}": lambda kind=kind, mode=mode: saved(photo().convert(mode), kind)
        for kind, modes in {
            "JPEG": ["RGB", "L", "CMYK"],
            "PNG": ["RGB", "RGBA", "L", "LA", "P", "1"],
            "TIFF": ["RGB", "RGBA", "CMYK", "I", "F", "LAB", "1"],
            "WEBP": ["RGB", "RGBA"],
            "GIF": ["P", "L"],
            "BMP": ["RGB", "P", "1"],
            "AVIF": ["RGB", "RGBA", "L"],
            "HEIF": ["RGB", "RGBA", "L"],
        }.items()
        for mode in modes
        if kind in FORMATS
    },
    **{
        f"{kind} transparent": lambda kind=kind: saved(transparent(), kind)
        for kind in ("PNG", "TIFF", "WEBP", "AVIF", "HEIF")
        if kind in FORMATS
    },
    **{
        f"{kind} of several": lambda kind=kind: several(kind)
        for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF", "HEIF")
        if kind in (*FORMATS, "MPO")
    },
    **{
        f"{kind} with orientation {orientation}": lambda kind=kind, orientation=orientation: turned(
            kind, orientation
        )
        for kind in ("JPEG", "TIFF", "PNG", "WEBP", "AVIF", "HEIF")
        for orientation in (3, 6)
        if kind in FORMATS
    },
    **{
        f"ICO {mode} {bitmap}": lambda mode=mode, bitmap=bitmap: icon(mode, bitmap)
        for mode in ("RGB", "RGBA", "P", "1")
        for bitmap in ("png", "bmp")
    },
    "JPEG progressive": lambda: saved(photo(), "JPEG", progressive=True),
    "JPEG with all of its colour": lambda: saved(photo(), "JPEG", subsampling=0),
    "JPEG YCCK": ycck,
    "WEBP lossless": lambda: saved(photo(), "WEBP", lossless=True),
    "WEBP lossless transparent": lambda: saved(transparent(), "WEBP", lossless=True),
    "PNG 16 bit grey": lambda: sixteen_bit_grey("PNG"),
    "PNG 16 bit colour": sixteen_bit_png,
    "PNG LA transparent": lambda: saved(transparent("LA"), "PNG"),
    "PNG palette with a transparent entry": lambda: palette(transparency=3),
    "PNG palette with alphas": lambda: palette(transparency=bytes(range(256))),
    "PNG with a transparent colour": lambda: saved(photo(), "PNG", transparency=(1, 2, 3)),
    "TIFF 16 bit grey": lambda: sixteen_bit_grey("TIFF"),
    "TIFF 16 bit colour": sixteen_bit_tiff,
    "TIFF tiles": lambda: tiff(100, 90, zlib.compress(noise(128, 128).tobytes()), tile=128),
    **{
        f"{width} x {height}": lambda width=width, height=height: saved(noise(width, height), "PNG")
        for width, height in [(1, 1), (2, 3), (64, 64), (65, 64), (301, 777), (900, 1), (1, 900)]
    },
}


@cache
def sample(name: str) -> bytes:
    return SAMPLES[name]()


@pytest.fixture
def hidden(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the package that the test names look as if it were not installed."""
    monkeypatch.setitem(sys.modules, request.param, None)
    readable_formats.cache_clear()
    yield
    readable_formats.cache_clear()


without_heif = pytest.mark.parametrize("hidden", ["pillow_heif"], indirect=True)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [64, pytest.param(224, marks=pytest.mark.slow)])
def test_exact_equals_open_clip_to_the_pixel(size: int, resize: Any) -> None:
    pytest.importorskip("open_clip")
    transform = ImageTransform(ImageSpec(size, resize=resize), exact=True)
    for name in SAMPLES:
        found, expected = transform(sample(name)), open_clip_pixels(sample(name), size, resize)
        np.testing.assert_array_equal(found, expected, err_msg=name)


THIN = [(7, 3000), (3001, 9), (1, 2000), (37, 2999)]


@pytest.mark.parametrize(
    ("mode", "size"),
    [*(("RGB", size) for size in THIN), *((mode, (7, 700)) for mode in ("RGBA", "P", "I;16"))],
    ids=str,
)
def test_exact_equals_open_clip_whatever_the_shape(mode: str, size: tuple[int, int]) -> None:
    pytest.importorskip("open_clip")
    data = saved(noise_in(mode, *size), "PNG")
    found = ImageTransform(ImageSpec(224), exact=True)(data)
    np.testing.assert_array_equal(found, open_clip_pixels(data, 224, "shortest"))


def test_a_big_endian_tiff_is_the_png_of_the_same_pixels() -> None:
    grey = noise_in("I;16", 300, 200)
    values = np.asarray(grey).astype(">u2").tobytes()
    tiff = saved(Image.frombytes("I;16B", grey.size, values), "TIFF")
    assert Image.open(io.BytesIO(tiff)).mode == "I;16B"
    found = ImageTransform(SPEC, exact=True)(tiff)
    np.testing.assert_array_equal(found, ImageTransform(SPEC, exact=True)(saved(grey, "PNG")))


def noise_in(mode: str, width: int, height: int) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(noise(width, height))[..., 0].astype(np.uint16) * 2)
    image = noise(width, height)
    if mode == "RGBA":
        image.putalpha(noise(height, width).transpose(Image.Transpose.ROTATE_90).convert("L"))
    return image.convert(mode)


@pytest.mark.parametrize("size", THIN, ids="{0[0]} x {0[1]}".format)
def test_the_centre_alone_differs_by_rounding(size: tuple[int, int]) -> None:
    data = saved(noise(*size), "PNG")
    centre = ImageTransform(ImageSpec(224), max_pixels=size[0] * size[1])(data)
    whole = ImageTransform(ImageSpec(224))(data)
    different = np.abs(centre.astype(np.int64) - whole)
    assert different.max() <= 1
    assert np.count_nonzero(different) <= 100


def open_clip_pixels(data: bytes, size: int, resize: str) -> NDArray[np.uint8]:
    """Returns the pixels of open_clip's transform, before they are normalised."""
    from open_clip import image_transform

    transform = image_transform(
        size, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=resize
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of transparency
        scaled = transform(Image.open(io.BytesIO(data))).numpy()
    pixels: NDArray[np.uint8] = (scaled * 255).round().astype(np.uint8)
    return pixels


@pytest.mark.parametrize("name", SAMPLES)
def test_every_kind_of_image_gives_pixels(name: str) -> None:
    pixels = ImageTransform(SPEC)(sample(name))
    assert pixels.shape == (3, 64, 64)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("name", SAMPLES)
def test_fast_is_close_to_exact(name: str) -> None:
    assert difference(sample(name), 64).mean() < 0.2
    assert difference(sample(name), 224).mean() < 0.2


def difference(data: bytes, size: int, resize: Any = "shortest") -> NDArray[np.int64]:
    """Between the fast transform's values and the exact one's, none below 0."""
    spec = ImageSpec(size, resize=resize)
    fast, exact = ImageTransform(spec)(data), ImageTransform(spec, exact=True)(data)
    found: NDArray[np.int64] = np.abs(fast.astype(np.int64) - exact)
    return found


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_scaled_decoding_is_close_to_exact(kind: str) -> None:
    found = difference(saved(photo(1600, 1200), kind, quality=90), 64)
    assert 0 < found.mean() < 0.2


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_scaled_decoding_does_not_shift_a_image(resize: Any) -> None:
    # An eighth of these sides is not whole: the last pixels are only partly the image's.
    rows, columns = np.mgrid[0:3593, 0:3601]
    waves = 127 + 60 * (np.sin(columns / 30) + np.sin(rows / 30))
    data = saved(Image.fromarray(waves.astype(np.uint8)), "JPEG", quality=95)
    assert difference(data, 224, resize).mean() < 0.5


def test_a_jpeg_under_twice_the_size_is_decoded_whole() -> None:
    data = saved(photo(1000, 447), "JPEG")
    fast, exact = ImageTransform(ImageSpec(224)), ImageTransform(ImageSpec(224), exact=True)
    np.testing.assert_array_equal(fast(data), exact(data))


def test_the_memory_of_an_unknown_pillow_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.__version__", "99.0.0")
    assert not difference(sample("PNG RGB"), 64).any()


@pytest.mark.parametrize(("width", "height"), [(100_000, 1), (1, 100_000)])
def test_a_thin_image_is_not_blown_up(width: int, height: int) -> None:
    ramp = np.linspace(0, 255, width * height).astype(np.uint8).reshape(height, width)
    pixels = ImageTransform(SPEC)(saved(Image.fromarray(ramp), "PNG"))
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
        (b"\x00\x00\x00\x18ftypisom\x00\x00", "a video file"),
        (b"\x00" * 100, "100 bytes"),
    ],
)
def test_what_is_not_a_image_is_an_item_error(data: bytes, message: str) -> None:
    with pytest.raises(ItemError, match=message) as caught:
        ImageTransform(SPEC)(data)
    for kind in FORMATS:
        named = {"WEBP": "WebP", "HEIF": "HEIC"}.get(kind, kind)
        assert named in str(caught.value)


@without_heif
def test_heic_without_its_package(hidden: None) -> None:
    del hidden
    head = b"\x00\x00\x00\x18ftypheic" + bytes(200)
    with pytest.raises(ItemError, match=r"pip install 'clip-microservice\[heif\]'"):
        ImageTransform(SPEC)(head)
    with pytest.raises(ItemError) as caught:
        ImageTransform(SPEC)(b"not an image")
    assert "HEIC" not in str(caught.value)


@pytest.mark.parametrize("kind", ["JPEG2000", "PPM", "TGA", "EPS", "PDF"])
def test_other_formats_are_not_opened(kind: str) -> None:
    with pytest.raises(ItemError, match="not an image the server can read"):
        ImageTransform(SPEC)(saved(photo(), kind))


@pytest.mark.skipif("HEIF" not in FORMATS, reason="pillow-heif is not installed")
@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
def test_a_brand_that_heic_and_avif_share(kind: str) -> None:
    data = saved(photo(), kind)
    shared = data.replace(b"ftypheic", b"ftypmif1").replace(b"ftypavif", b"ftypmif1")
    assert shared != data
    np.testing.assert_array_equal(ImageTransform(SPEC)(shared), ImageTransform(SPEC)(data))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_off_image_is_an_item_error(kind: str) -> None:
    data = saved(photo(), kind)
    for part in (10, 40, len(data) // 2):
        with pytest.raises(ItemError) as caught:
            ImageTransform(SPEC)(data[:part])
        assert "0x" not in str(caught.value)
        assert "PIL" not in str(caught.value)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    # The header of a PNG says 30,000 x 20,000; there is nothing behind it to decode.
    header = struct.pack(">IIBBBBB", 30_000, 20_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")
    with pytest.raises(ItemError, match="30000 x 20000 = 600,000,000 pixels; at most 134,217,728"):
        ImageTransform(SPEC)(data)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "ICO"])
def test_the_limit_on_pixels_holds_for_every_format(kind: str) -> None:
    with pytest.raises(ItemError, match="300 x 200 = 60,000 pixels; at most 59,999"):
        ImageTransform(SPEC, max_pixels=59_999)(saved(photo(), kind))
    ImageTransform(SPEC, max_pixels=60_000)(saved(photo(), kind))


@pytest.mark.parametrize("bitmap", ["png", "bmp"])
def test_the_limit_on_pixels_holds_for_the_image_inside_an_icon(bitmap: str) -> None:
    data = bytearray(saved(photo(), "ICO", sizes=[(90, 60)], bitmap_format=bitmap))
    if bitmap == "png":
        start = data.index(b"IHDR")
        header = b"IHDR" + struct.pack(">II", 30_000, 20_000) + data[start + 12 : start + 17]
        data[start : start + 21] = header + struct.pack(">I", zlib.crc32(header))
    else:  # a DIB counts its mask as further rows
        start = data.index(struct.pack("<iii", 40, 90, 120))
        data[start + 4 : start + 12] = struct.pack("<ii", 30_000, 40_000)
    with pytest.raises(ItemError, match="30000 x 20000 = 600,000,000 pixels"):
        ImageTransform(SPEC)(bytes(data))


SIDE = 11_500  # of a square just below the limit


def png_of(data: bytes, colours: int = 2, bits: int = 8, side: int = SIDE) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, bits, colours, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def claiming(kind: str, **options: Any) -> bytes:
    """A small image whose header says that it is large."""
    data = bytearray(saved(noise(300, 200), kind, **options))
    size = struct.pack("<HH", SIDE, SIDE)
    if kind == "JPEG":
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
        data[start + 5 : start + 9] = struct.pack(">HH", SIDE, SIDE)
    elif kind == "GIF":
        frame = data.index(b",\0\0\0\0")
        data[6:10] = data[frame + 5 : frame + 9] = size
    else:
        data[18:26] = struct.pack("<ii", SIDE, SIDE)
    return bytes(data)


LIES: dict[str, Callable[[], bytes]] = {
    "PNG without data": lambda: png_of(b""),
    "PNG of 16 bits": lambda: png_of(zlib.compress(bytes(1000)), colours=0, bits=16),
    "PNG of 1 bit": lambda: png_of(zlib.compress(bytes(1000)), colours=0, bits=1),
    "PNG with alpha": lambda: png_of(zlib.compress(bytes(1000)), colours=6),
    "JPEG": lambda: claiming("JPEG"),
    "JPEG progressive": lambda: claiming("JPEG", progressive=True),
    "JPEG cut off": lambda: claiming("JPEG")[:700],
    "GIF": lambda: claiming("GIF")[:20_000],
    "BMP": lambda: claiming("BMP"),
    "TIFF": lambda: tiff(SIDE, SIDE, bytes(1000)),
}


@pytest.mark.parametrize("name", LIES)
def test_no_memory_is_taken_for_pixels_that_the_data_cannot_hold(name: str) -> None:
    data = LIES[name]()
    for exact in (False, True):
        transform = ImageTransform(SPEC, exact)
        transform(saved(photo(), name.split()[0]))  # loads what Pillow loads only once
        Image.core.reset_stats()
        with pytest.raises(ItemError, match="cut off"):
            transform(data)
        assert Image.core.get_stats()["allocated_blocks"] == 0


def test_data_that_compresses_best_is_not_taken_for_cut_off() -> None:
    """As few bytes for each pixel as the format allows."""
    blank = Image.new("1", (3000, 3000))
    for image, kind in ((blank, "PNG"), (blank.convert("P"), "GIF"), (blank.convert("L"), "JPEG")):
        assert not ImageTransform(SPEC)(saved(image, kind, optimize=True)).any()


def resident(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)


@pytest.mark.slow
def test_a_server_returns_the_memory_of_large_images(start: Start) -> None:
    """Whole and damaged images of the largest size, which are decoded before they fail."""
    server = start(flow("onnx"))
    client, processes = Client(server.grpc), server.family()
    # Of several sizes, as malloc keeps a freed block for a slightly smaller one.
    large = [
        png_of(zlib.compress(bytes(size * (3 * side + 1)), 1), side=side)
        for side in (SIDE, 10_000, 9_000)
        for size in (side, side // 2)
    ]
    for _ in range(10):
        client.encode(["a text", photo()])
    before = resident(processes)
    for number in range(4):
        client.encode([data + bytes([number]) for data in large], on_item_error="return")
    assert eventually(lambda: resident(processes) <= 1.1 * before), (before, resident(processes))


def test_a_tile_larger_than_its_image_counts() -> None:
    data = tiff(10, 10, zlib.compress(bytes(1000)), tile=30_000)
    with pytest.raises(ItemError, match="30000 x 30000 = 900,000,000 pixels"):
        ImageTransform(SPEC)(data)


def test_damaged_images_only_ever_raise_item_errors(caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        transform = ImageTransform(SPEC)
        for data in [sample(name) for name in SAMPLES] * 4:
            damaged = np.frombuffer(data, dtype=np.uint8).copy()
            places = rng.integers(0, min(len(data), 1000), size=rng.integers(1, 20))
            damaged[places] = rng.integers(0, 256, size=len(places))
            with contextlib.suppress(ItemError):
                transform(damaged.tobytes())
    assert not caplog.records


def compressed_text(name: bytes, size: int) -> bytes:
    """A chunk of a PNG with this much text or profile in it, which compresses a thousandfold."""
    head = {b"zTXt": b"Comment\0\0", b"iTXt": b"Comment\0\1\0\0\0", b"iCCP": b"profile\0\0"}
    packer = zlib.compressobj()
    blocks = [packer.compress(bytes([65]) * 2**20) for _ in range(size // 2**20)]
    return png_chunk(name, head[name] + b"".join(blocks) + packer.flush())


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_compressed_texts_in_a_png_are_not_inflated(name: bytes, behind: bool) -> None:
    plain, transform = saved(photo(30, 20), "PNG"), ImageTransform(SPEC)
    expected = transform(plain)  # and everything there is to import is imported
    place = -12 if behind else 33  # before IEND, or after IHDR
    for text in (compressed_text(name, 2 * 2**20), compressed_text(name, 128 * 2**20)):
        data = plain[:place] + text * 2 + plain[place:]
        tracemalloc.start()
        try:
            np.testing.assert_array_equal(transform(data), expected)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2**20 + 3 * len(data)


@pytest.mark.parametrize("name", [b"tEXt", b"gAMA", b"eXIf", b"pHYs", b"acTL", b"fcTL", b"vpAg"])
def test_a_damaged_chunk_beside_the_pixels_of_a_png_does_not_matter(name: bytes) -> None:
    plain = saved(photo(), "PNG")
    for chunk in (png_chunk(name, b"\xff"), png_chunk(name, b"\xff" * 40)[:-4] + b"crc?"):
        found = ImageTransform(SPEC)(plain[:33] + chunk + plain[33:])
        np.testing.assert_array_equal(found, ImageTransform(SPEC)(plain))


@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xe1\x00\x10Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff\xe2\x00\x0eICC_PROFILE\0",
        b"\xff\xed\x00\x17Photoshop 3.0\0" + b"8BIM\x03\xed\xff",
        b"\xff\xff\xff\xfe\xff\xff" + bytes(65533),
    ],
    ids=["EXIF", "profile", "Photoshop", "comments"],
)
def test_damaged_segments_beside_the_pixels_of_a_jpeg_do_not_matter(segment: bytes) -> None:
    plain = saved(photo(), "JPEG", quality=95)
    found = ImageTransform(SPEC)(plain[:2] + segment * 20 + plain[2:])
    np.testing.assert_array_equal(found, ImageTransform(SPEC)(plain))


@pytest.mark.parametrize("kind", FORMATS)
def test_megabytes_of_metadata_do_not_matter(kind: str) -> None:
    plenty: dict[str, Any] = {
        "JPEG": {"comment": b"a" * 65_000, "icc_profile": b"p" * 2_000_000},
        "PNG": {"icc_profile": b"p" * 2_000_000},
        "GIF": {"comment": b"a" * 2_000_000},
        "TIFF": {"tiffinfo": {270: "a" * 2_000_000}, "icc_profile": b"p" * 2_000_000},
        "WEBP": {"xmp": b"a" * 2_000_000, "icc_profile": b"p" * 2_000_000},
    }
    data = saved(photo(), kind, **plenty.get(kind, {"xmp": b"a" * 2_000_000}))
    np.testing.assert_array_equal(
        ImageTransform(SPEC)(data), ImageTransform(SPEC)(saved(photo(), kind))
    )


def test_threads_share_a_transform() -> None:
    transform = ImageTransform(SPEC)
    files = [sample(name) for name in SAMPLES]
    alone = [transform(data) for data in files]
    with ThreadPoolExecutor(4) as pool:
        for expected, found in zip(alone, pool.map(transform, files), strict=True):
            np.testing.assert_array_equal(found, expected)
