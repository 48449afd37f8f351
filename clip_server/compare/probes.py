"""The texts and generated images that both servers embed, the same in every run."""

from __future__ import annotations

import random
from functools import cache
from io import BytesIO

from PIL import Image, ImageDraw, ImageFilter

# Short and long, in several scripts, and with what tokenizers treat differently: capitals, blanks,
# accents, numbers, HTML entities and emoji.
TEXTS = (
    "a photo of a cat",
    "a diagram of the water cycle",
    "two dogs running on a beach at sunset",
    "A PHOTO OF A DOG!!",
    "red",
    "a bowl of soup, a spoon and a napkin on a wooden table",
    "an astronaut riding a horse, in the style of an oil painting",
    "  blanks   between\twords\n",
    "it's the artist's 2nd self-portrait (1889)",
    "price: $1,299.00 - 20% off",
    "salt &amp; pepper",
    "crème brûlée à la carte",
    "ein großer Bär im Wald",
    "фотография кошки на диване",
    "海辺を走る犬の写真",
    "صورة قطة",
    "고양이 사진",
    "🍕 and 🚀",
    "IMG_20240131_093000.jpg",
    "a street market with stalls of fruit, vegetables and flowers, "
    "people with umbrellas, bicycles leaning on a wall and a small white dog",
    # Longer than most models read, so that truncation is compared too.
    "a long description of a room with " + "a chair, a table, a lamp, a window, " * 20,
)
# Widths and heights: square, wide, tall, smaller than what most models read, and so large that a
# server may decode a JPEG at a smaller scale.
_SIZES = ((224, 224), (640, 480), (480, 640), (900, 300), (120, 160), (1920, 1440))
# Per size: encoded images of either form.
_FORMATS = ("PNG", "JPEG")
# A PNG's first bytes and nothing else: only a server that reads it as a text embeds it.
BROKEN_IMAGE = b"\x89PNG\r\n\x1a\n" + bytes(16)


@cache
def images() -> tuple[bytes, ...]:
    """Encoded images: coloured shapes on smooth backgrounds, in PNG and JPEG."""
    rng = random.Random(0)
    return tuple(_image(rng, size, form) for size in _SIZES for form in _FORMATS)


def _image(rng: random.Random, size: tuple[int, int], form: str) -> bytes:
    width, height = size
    corners = Image.new("RGB", (2, 2))
    for x in range(2):
        for y in range(2):
            corners.putpixel((x, y), _color(rng))
    image = corners.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = rng.randrange(width), rng.randrange(height)
        box = (left, top, left + rng.randrange(8, width // 2), top + rng.randrange(8, height // 2))
        rng.choice((draw.ellipse, draw.rectangle))(box, fill=_color(rng))
    file = BytesIO()
    # Softer edges, as those of photos.
    image.filter(ImageFilter.GaussianBlur(1)).save(file, form)
    return file.getvalue()


def _color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)
