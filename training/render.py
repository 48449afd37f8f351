"""Render every drawing of every set once to small RGBA pictures.

Run as ``python -m training.render``; writes ``.cache/renders.npy`` (N, S, S, 4)
with straight alpha, and ``.cache/renders.json`` with set and concept of each.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from training.concepts import Concept, load_concepts, load_json, name_index, normal_code, slug
from training.fetch import CACHE, MODULES

SIZE = 88
HELD_OUT = "fluent-emoji-flat"
CODED_SETS = ("noto", "twemoji", HELD_OUT)
NAMED_SETS = ("noto-v1", "fxemoji", "streamline-emojis")
ICON_SETS: dict[str, str] = {
    "flat-color-icons": r"",
    "streamline-color": r"-flat",
    "streamline-plump-color": r"-flat",
    "streamline-kameleon-color": r"",
    "icon-park": r"",
    "mdi": r"",
    "ph": r"-fill",
    "game-icons": r"",
    "tabler": r"-filled",
}
MONO_SETS = frozenset(ICON_SETS) - {"flat-color-icons"} | {"emojione-bw", "noto-mono"}
FONTS = {"noto-mono": "700Bold/NotoEmoji_700Bold.ttf"}
XMLNS = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Drawing:
    """One drawing to render: an SVG text, or one character of a font file."""

    style: str
    concept: int
    svg: str
    font: str = ""


def iconify_svgs(folder: Path) -> dict[str, str]:
    """Name to SVG text of an iconify set, aliases included."""
    data = load_json(folder / "icons.json")
    width, height = data.get("width", 16), data.get("height", 16)
    found: dict[str, str] = {}
    for name, icon in data["icons"].items():
        box = (icon.get("left", 0), icon.get("top", 0))
        size = (icon.get("width", width), icon.get("height", height))
        view = f"{box[0]} {box[1]} {size[0]} {size[1]}"
        body = icon["body"].replace("currentColor", "#000")
        found[name] = f'<svg {XMLNS} viewBox="{view}">{body}</svg>'
    for name, alias in data.get("aliases", {}).items():
        if set(alias) == {"parent"} and alias["parent"] in found:
            found[name] = found[alias["parent"]]
    return found


def _coded(style: str, place: dict[str, int]) -> Iterator[Drawing]:
    folder = MODULES / "@iconify-json" / style
    svgs = iconify_svgs(folder)
    for code, name in load_json(folder / "chars.json").items():
        found = place.get(normal_code(code))
        if found is not None and name in svgs:
            yield Drawing(style, found, svgs[name])


def _named(style: str, index: dict[str, int], suffix: str = "") -> Iterator[Drawing]:
    seen: set[tuple[int, str]] = set()
    for name, svg in iconify_svgs(MODULES / "@iconify-json" / style).items():
        names = [name]
        if suffix and name.endswith(suffix):
            names.append(name.removesuffix(suffix))
        if style == "streamline-emojis":
            names.append(name.rstrip("0123456789").rstrip("-"))
        found = next((index[slug(n)] for n in names if slug(n) in index), None)
        if found is not None and (found, svg) not in seen:
            seen.add((found, svg))
            yield Drawing(style, found, svg)


def _files(style: str, folder: Path, place: dict[str, int]) -> Iterator[Drawing]:
    for path in sorted(folder.glob("*.svg")):
        found = place.get(normal_code(path.stem))
        if found is not None:
            yield Drawing(style, found, path.read_text(encoding="utf-8"))


def _glyphs(style: str, concepts: list[Concept]) -> Iterator[Drawing]:
    font = str(MODULES / "@expo-google-fonts/noto-emoji" / FONTS[style])
    for i, concept in enumerate(concepts):
        parts = concept.code.split("-")
        if len(parts) == 1:
            yield Drawing(style, i, chr(int(parts[0], 16)), font)


def all_drawings(concepts: list[Concept]) -> Iterator[Drawing]:
    """Every drawing of every set that shows one of ``concepts``."""
    place = {c.code: i for i, c in enumerate(concepts)}
    index = name_index(concepts)
    for style in CODED_SETS:
        yield from _coded(style, place)
    for style in NAMED_SETS:
        yield from _named(style, index)
    assets = MODULES / "emojione/assets"
    yield from _files("emojione", assets / "svg", place)
    yield from _files("emojione-bw", assets / "svg_bw", place)
    for style in FONTS:
        yield from _glyphs(style, concepts)
    for style, suffix in ICON_SETS.items():
        yield from _named(style, index, suffix)


def _fit(image: Image.Image, size: int) -> Pixels:
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(canvas)


def _glyph(drawing: Drawing, size: int) -> Image.Image:
    font = ImageFont.truetype(drawing.font, size * 2)
    image = Image.new("RGBA", (size * 4, size * 4))
    ImageDraw.Draw(image).text((size, size), drawing.svg, font=font, fill=(0, 0, 0, 255))
    return image.crop(image.getbbox())


def render_svg(svg: str, size: int) -> Image.Image:
    """Rasterise an SVG text so that its longer side is ``size`` pixels."""
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def render(drawing: Drawing, size: int = SIZE) -> Pixels | None:
    """RGBA pixels of one drawing; None if it cannot be drawn or is empty."""
    try:
        image = _glyph(drawing, size) if drawing.font else render_svg(drawing.svg, size * 2)
        pixels = _fit(image, size)
    except (ValueError, OSError):
        return None
    return pixels if (pixels[..., 3] > 32).sum() > 20 else None


def main() -> None:
    """Render all drawings and store them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=CACHE / "renders")
    args = parser.parse_args()
    concepts = load_concepts()
    drawings = list(all_drawings(concepts))
    with ProcessPoolExecutor(2) as pool:
        results = list(pool.map(render, drawings, chunksize=64))
    kept = [(d, p) for d, p in zip(drawings, results, strict=True) if p is not None]
    np.save(args.out.with_suffix(".npy"), np.stack([p for _, p in kept]))
    table = [[d.style, concepts[d.concept].code] for d, _ in kept]
    args.out.with_suffix(".json").write_text(json.dumps(table), encoding="utf-8")
    for style in dict.fromkeys(s for s, _ in table):
        codes = [c for s, c in table if s == style]
        print(f"{style:28} {len(codes):5} drawings of {len(set(codes)):5} concepts")


if __name__ == "__main__":
    main()
