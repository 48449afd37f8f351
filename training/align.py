"""Last step of the training: fit the text tower to the finished image tower.

Run as ``python -m training.align --minutes 4``. The pictures of all drawings are encoded
once; each step then tells the texts of concepts that look alike apart from each other.
"""

from __future__ import annotations

import argparse
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from open_clip.model import CLIP
from torch import Tensor
from torch.nn import functional as F

from training.augment import augment
from training.concepts import Concept, load_concepts
from training.evaluate import evaluate, image_features
from training.export import averaged_model
from training.fetch import CACHE
from training.model import MODEL_CFG, build_tokenizer
from training.render import HELD_OUT
from training.train import THREADS, Drawings, caption, encode_text, load_drawings, rate

SCALE = 40.0
SEEDS, NEIGHBOURS = 6, 16


class Pictures:
    """Embeddings of every coloured drawing, mildly varied, by concept."""

    def __init__(self, model: CLIP, concepts: list[Concept], rounds: int) -> None:
        """Encode every drawing ``rounds`` times."""
        data = load_drawings(concepts, {HELD_OUT})
        rows = [(int(r), i) for i, own in enumerate(data.by_concept) for r in own]
        rows = [(r, i) for r, i in rows if not data.mono[r]]
        with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = np.array_split(np.array(rows), THREADS * 8)
            jobs = [(part, 0.1 + 0.3 * k) for k in range(rounds) for part in parts]
            done = list(pool.map(lambda job: _encode(model, data, *job), jobs))
        self.features = torch.cat(done)
        self.concepts = torch.tensor([i for _, i in rows]).repeat(rounds)
        sums = torch.zeros(len(concepts), self.features.shape[1])
        self.centres = F.normalize(sums.index_add(0, self.concepts, self.features), dim=-1)
        self.present = torch.unique(self.concepts)

    def alike(self) -> Tensor:
        """Some concepts, each with those that look most like it."""
        seeds = self.present[torch.randperm(len(self.present))[:SEEDS]]
        near = self.centres[seeds] @ self.centres[self.present].T
        found = self.present[near.topk(NEIGHBOURS).indices]
        alike: Tensor = torch.unique(found)
        return alike


def _encode(model: CLIP, data: Drawings, rows: npt.NDArray[np.int64], strength: float) -> Tensor:
    pixels = torch.from_numpy(data.pixels[rows[:, 0]])
    still = torch.zeros(len(rows), dtype=torch.bool)
    size = MODEL_CFG["vision_cfg"]["image_size"]
    return image_features(model, augment(pixels, still, still, size, strength))


def loss_of(model: CLIP, pictures: Pictures, concepts: list[Concept]) -> Tensor:
    """Texts against all pictures, and pictures against the texts of like concepts."""
    chosen = pictures.alike()
    tokens = build_tokenizer()([caption(concepts[i]) for i in chosen.tolist()])
    text = encode_text(model, tokens[:, : int((tokens != 0).sum(1).max())])
    logits = SCALE * text @ pictures.features.T
    same = (chosen.unsqueeze(1) == pictures.concepts.unsqueeze(0)).float()
    by_text = F.cross_entropy(logits, same / same.sum(1, keepdim=True))
    mine = same.any(0)
    by_image = F.cross_entropy(logits[:, mine].T, same[:, mine].argmax(0))
    return by_text + by_image


def fit(model: CLIP, pictures: Pictures, concepts: list[Concept], args: argparse.Namespace) -> None:
    """Train the text tower alone for the minutes asked for."""
    model.visual.requires_grad_(False)
    model.logit_scale.requires_grad_(False)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.02, fused=True)

    def share(_: int) -> float:
        loss = loss_of(model, pictures, concepts) / THREADS
        torch.autograd.backward(loss)
        return loss.item()

    start, step = time.monotonic(), 0
    with ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while (progress := (time.monotonic() - start) / 60 / args.minutes) < 1:
            for group in optimiser.param_groups:
                group["lr"] = args.lr * rate(progress)
            optimiser.zero_grad(set_to_none=True)
            loss = sum(pool.map(share, range(THREADS)))
            optimiser.step()
            step += 1
            if step % 50 == 0:
                print(f"{progress:.2f}  step {step}  loss {loss:.3f}", flush=True)


def main() -> None:
    """Fit the text tower, log the held-out retrieval before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--checkpoint", type=Path, default=CACHE / "train.pt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    concepts = load_concepts()
    model = averaged_model(args.checkpoint)
    print("before", evaluate(model, concepts), flush=True)
    pictures = Pictures(model, concepts, 2)
    print(f"{len(pictures.features)} pictures encoded", flush=True)
    fit(model, pictures, concepts, args)
    torch.save({"average": model.state_dict()}, CACHE / f"aligned_{args.seed}.pt")
    print("after", evaluate(model.eval(), concepts), flush=True)


if __name__ == "__main__":
    main()
