"""Draw the README's picture: queries, and what they find in the held-out style.

Run as ``python -m training.showcase``; writes ``docs/result.png`` with whatever the exported
model ranks first, right or wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.concepts import load_concepts
from training.evaluate import (
    held_out_drawings,
    held_out_images,
    image_features,
    load_exported,
    on_background,
    text_features,
)
from training.render import render_svg

QUERIES = (
    "a smiling cat",
    "a red heart",
    "a flower",
    "a moon",
    "a clock",
    "an umbrella",
)
SHOWN = 6
TILE, GAP, LABEL = 88, 12, 250


def best_drawings(queries: tuple[str, ...], shown: int) -> list[list[str]]:
    """For each query the SVG texts of its best drawings, best first."""
    concepts = load_concepts()
    drawings = held_out_drawings(concepts)
    model = load_exported()
    images, _ = held_out_images(concepts, model.visual.image_size)
    similarity = text_features(model, list(queries)) @ image_features(model, images).T
    best = similarity.topk(shown, dim=1).indices.tolist()
    return [[drawings[place][1] for place in row] for row in best]


def draw(queries: tuple[str, ...], found: list[list[str]]) -> Image.Image:
    """A row for each query: its words, then the drawings."""
    width = LABEL + SHOWN * (TILE + GAP) + GAP
    picture = Image.new("RGB", (width, len(queries) * (TILE + GAP) + GAP), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(18)
    for row, (query, svgs) in enumerate(zip(queries, found, strict=True)):
        top = GAP + row * (TILE + GAP)
        pen.text((LABEL - GAP, top + TILE // 2), query, "black", font, anchor="rm")
        for column, svg in enumerate(svgs):
            tile = on_background(render_svg(svg, TILE))
            picture.paste(tile, (LABEL + GAP + column * (TILE + GAP), top))
    return picture


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/result.png"))
    args = parser.parse_args()
    draw(QUERIES, best_drawings(QUERIES, SHOWN)).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
