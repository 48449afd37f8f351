"""Retrieval over the held-out style, from the exported files or a checkpoint.

Run as ``python -m training.evaluate``; prints R@1, R@5 and R@10, both ways.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from open_clip.model import CLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from training.concepts import Concept, load_concepts, load_json, normal_code
from training.fetch import CACHE, MODULES
from training.model import PREPROCESS_CFG, build_model, build_tokenizer
from training.render import HELD_OUT, iconify_svgs, render_svg

EXPORTED = Path("clip_server/models/embedded")
RENDER_SIZE = 256


def on_background(image: Image.Image, colour: str = "white") -> Image.Image:
    """``image`` pasted on a plain background, as RGB."""
    canvas = Image.new("RGBA", image.size, colour)
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def held_out_drawings(concepts: list[Concept]) -> list[tuple[int, str]]:
    """Position of the concept and SVG text of each held-out base drawing."""
    folder = MODULES / "@iconify-json" / HELD_OUT
    place = {c.code: i for i, c in enumerate(concepts)}
    svgs = iconify_svgs(folder)
    found = {
        place[normal_code(code)]: svgs[name]
        for code, name in load_json(folder / "chars.json").items()
        if normal_code(code) in place and name in svgs
    }
    return sorted(found.items())


def held_out_images(concepts: list[Concept], size: int) -> tuple[Tensor, list[int]]:
    """Preprocessed held-out pictures (n, 3, size, size) with their concepts."""
    drawings = held_out_drawings(concepts)
    cache = CACHE / f"heldout_{size}.npy"
    if not cache.exists():
        transform = image_transform_v2(PreprocessCfg(size=size, **PREPROCESS_CFG), is_train=False)
        images = [transform(on_background(render_svg(svg, RENDER_SIZE))) for _, svg in drawings]
        np.save(cache, torch.stack(images).numpy())
    return torch.from_numpy(np.load(cache)), [i for i, _ in drawings]


@torch.no_grad()
def image_features(model: CLIP, images: Tensor, batch: int = 64) -> Tensor:
    """Unit-length embeddings of preprocessed pictures."""
    parts = [F.normalize(model.encode_image(part), dim=-1) for part in torch.split(images, batch)]
    return torch.cat(parts)


@torch.no_grad()
def text_features(model: CLIP, texts: list[str], batch: int = 64) -> Tensor:
    """Unit-length embeddings of texts."""
    tokens = build_tokenizer(model.vocab_size)(texts)
    parts = [F.normalize(model.encode_text(part), dim=-1) for part in torch.split(tokens, batch)]
    return torch.cat(parts)


def recalls(similarity: Tensor, at: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of rows whose diagonal entry is among the best k of its row."""
    own = similarity.diagonal().unsqueeze(1)
    rank = (similarity > own).sum(1)
    return {f"R@{k}": (rank < k).float().mean().item() for k in at}


def evaluate(model: CLIP, concepts: list[Concept]) -> dict[str, dict[str, float]]:
    """Retrieval both ways over the held-out style, queries being the labels."""
    size = model.visual.image_size
    images, order = held_out_images(concepts, size if isinstance(size, int) else size[0])
    image = image_features(model, images)
    text = text_features(model, [concepts[i].label for i in order])
    return {"text_to_image": recalls(text @ image.T), "image_to_text": recalls(image @ text.T)}


def load_exported(folder: Path = EXPORTED) -> CLIP:
    """The exported model in fp32, ready for inference."""
    cfg = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    model = build_model(cfg["model_cfg"])
    state = load_file(folder / "open_clip_model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    return model.eval()


def main() -> None:
    """Evaluate the exported files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=EXPORTED)
    args = parser.parse_args()
    torch.set_num_threads(2)
    concepts = load_concepts()
    model = load_exported(args.model)
    for way, table in evaluate(model, concepts).items():
        print(way, "  ".join(f"{k} {v:.3f}" for k, v in table.items()))


if __name__ == "__main__":
    main()
