"""Render the sample pictures that come with the package, and try the model on them.

Run as ``python -m training.samples``; the pictures are of the held-out style.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from training.concepts import load_concepts
from training.evaluate import (
    EXPORTED,
    RENDER_SIZE,
    held_out_drawings,
    image_features,
    load_exported,
    on_background,
    text_features,
)
from training.model import PREPROCESS_CFG
from training.render import render_svg

SAMPLES: dict[str, tuple[str, str]] = {
    "cat": ("1F63A", "a smiling cat"),
    "dog": ("1F415-200D-1F9BA", "a dog"),
    "pizza": ("1F355", "a slice of pizza"),
    "car": ("1F697", "a car"),
    "tree": ("1F384", "a christmas tree"),
    "rocket": ("1F680", "a rocket"),
    "house": ("1F3E0", "a house"),
    "guitar": ("1F3B8", "a guitar"),
}


def write_samples(folder: Path) -> dict[str, Image.Image]:
    """Render each sample on white into ``folder`` as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    concepts = load_concepts()
    svgs = {concepts[i].code: svg for i, svg in held_out_drawings(concepts)}
    images: dict[str, Image.Image] = {}
    for name, (code, _) in SAMPLES.items():
        images[name] = on_background(render_svg(svgs[code], RENDER_SIZE))
        images[name].save(folder / f"{name}.png", optimize=True)
    return images


def similarities(model: CLIP, images: dict[str, Image.Image]) -> torch.Tensor:
    """Cosines of each sample (row) with each sample's text (column)."""
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    transform = image_transform_v2(PreprocessCfg(size=side, **PREPROCESS_CFG), is_train=False)
    pictures = torch.stack([transform(image) for image in images.values()])
    texts = [text for _, text in SAMPLES.values()]
    return image_features(model, pictures) @ text_features(model, texts).T


def main() -> None:
    """Write the samples and print how the exported model ranks them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EXPORTED)
    args = parser.parse_args()
    images = write_samples(args.model / "samples")
    model = load_exported(args.model)
    for name, row in zip(images, similarities(model, images), strict=True):
        print(f"{name:8}", " ".join(f"{value:6.2f}" for value in row))


if __name__ == "__main__":
    main()
