"""Train the model for a given number of minutes; a killed run can go on.

Run as ``python -m training.train --minutes 90``. The learning rate follows the
time spent, so the run ends annealed whatever else the machine is doing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from open_clip.model import CLIP
from torch import Tensor, nn
from torch.nn import functional as F

from training.augment import augment
from training.concepts import FLAG_GROUP, Concept, load_concepts
from training.evaluate import evaluate
from training.fetch import CACHE
from training.model import MODEL_CFG, build_model, build_tokenizer
from training.render import HELD_OUT, MONO_SETS

TEMPLATES = (
    "a {}", "an icon of {}", "a drawing of {}", "{} emoji", "a picture of a {}",
    "an emoji of {}", "the {}", "a drawing of a {}", "an image of {}", "a cartoon {}",
    "this is a {}", "a photo of a {}", "an illustration of a {}", "{} icon",
)  # fmt: skip
MONO_WEIGHT = 0.1
FLAG_WEIGHT = 0.2
PER_CONCEPT = 2
REFRESH = 25  # steps between refreshments of the text bank
THREADS = 2  # each with its share of the batch: less waiting than threads within operations


@dataclass
class Drawings:
    """The rendered drawings by concept."""

    pixels: npt.NDArray[np.uint8]
    mono: Tensor
    by_concept: list[npt.NDArray[np.int64]]
    weights: list[npt.NDArray[np.float64]]
    concept_weight: npt.NDArray[np.float64]


def load_drawings(concepts: list[Concept], leave_out: set[str]) -> Drawings:
    """All renders but those of the styles to leave out."""
    pixels = np.load(CACHE / "renders.npy", mmap_mode="r")
    table = json.loads((CACHE / "renders.json").read_text(encoding="utf-8"))
    place = {c.code: i for i, c in enumerate(concepts)}
    mine: list[list[int]] = [[] for _ in concepts]
    for row, (style, code) in enumerate(table):
        if style not in leave_out:
            mine[place[code]].append(row)
    mono = torch.tensor([style in MONO_SETS for style, _ in table])
    rows = [np.array(r, dtype=np.int64) for r in mine]
    weights = [np.where(mono.numpy()[r], MONO_WEIGHT, 1.0) for r in rows]
    total = np.array([w.sum() ** 0.5 if len(w) else 0.0 for w in weights])
    total *= np.array([FLAG_WEIGHT if c.group == FLAG_GROUP else 1.0 for c in concepts])
    parts = [w / w.sum() if len(w) else w for w in weights]
    return Drawings(np.ascontiguousarray(pixels), mono, rows, parts, total / total.sum())


def caption(concept: Concept) -> str:
    """A random text for a concept: mostly its label, bare or in a sentence."""
    draw = random.random()
    if draw < 0.15 and concept.names:
        text = random.choice(concept.names)
    elif draw < 0.21 and concept.unique_tags:
        text = random.choice(concept.unique_tags)
    elif draw < 0.29 and len(concept.tags) > 2:
        return " ".join(random.sample(concept.tags, random.randint(2, min(4, len(concept.tags)))))
    else:
        text = concept.label
    if random.random() < 0.3:
        return random.choice(TEMPLATES).format(text)
    return text


class Batches:
    """Random batches: pictures, their concepts, and one caption per concept."""

    def __init__(self, concepts: list[Concept], drawings: Drawings, batch: int) -> None:
        """Keep what batches are drawn from."""
        self.concepts, self.drawings, self.batch = concepts, drawings, batch
        self.tokenizer = build_tokenizer()
        self.flippable = torch.tensor([c.flippable for c in concepts])
        self.rng = np.random.default_rng()

    def draw(self, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (n, 3, s, s), chosen concepts (n / 2), tokens (n / 2, t)."""
        data, count = self.drawings, self.batch // PER_CONCEPT
        chosen = self.rng.choice(len(self.concepts), count, replace=False, p=data.concept_weight)
        rows = np.stack([self._rows(c) for c in chosen]).T.reshape(-1)
        flips = self.flippable[torch.from_numpy(np.tile(chosen, PER_CONCEPT))]
        pixels = torch.from_numpy(data.pixels[rows])
        size = MODEL_CFG["vision_cfg"]["image_size"]
        images = augment(pixels, data.mono[torch.from_numpy(rows)], flips, size, strength)
        tokens = self.tokenizer([caption(self.concepts[c]) for c in chosen])
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        images = images.contiguous(memory_format=torch.channels_last)
        return images, torch.from_numpy(chosen), tokens

    def _rows(self, concept: int) -> npt.NDArray[np.int64]:
        rows, p = self.drawings.by_concept[concept], self.drawings.weights[concept]
        return self.rng.choice(rows, PER_CONCEPT, replace=len(rows) < PER_CONCEPT, p=p)


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """Like ``model.encode_text`` for tokens cut to the longest text."""
    length = tokens.shape[1]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.transformer(x, attn_mask=model.attn_mask[:length, :length])
    x = model.ln_final(x)[torch.arange(len(tokens)), tokens.argmax(1)]
    return F.normalize(x @ model.text_projection, dim=-1)


class Learner(nn.Module):
    """The model, with what only training needs.

    That is one learnable proxy per concept, and a bank with the text embedding of every
    concept's label. With them each step tells its pictures and texts apart from all
    concepts, not only from those of the batch.
    """

    bank: Tensor

    def __init__(self, concepts: list[Concept]) -> None:
        """Build a fresh model, its proxies, and an empty bank."""
        super().__init__()
        width = MODEL_CFG["embed_dim"]
        self.clip = build_model()
        self.proxies = nn.Parameter(torch.randn(len(concepts), width) * 0.05)
        self.register_buffer("bank", torch.zeros(len(concepts), width), persistent=False)
        self.tokens = build_tokenizer()([c.label for c in concepts])

    @torch.no_grad()
    def refresh_bank(self) -> None:
        """Encode all labels anew, texts of like length together."""
        lengths = (self.tokens != 0).sum(1)
        for part in torch.split(lengths.argsort(), 128):
            cut = self.tokens[part, : int(lengths[part].max())]
            self.bank[part] = encode_text(self.clip, cut)

    def forward(self, images: Tensor, chosen: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, and the embeddings of the pictures."""
        image = F.normalize(self.clip.visual(images), dim=-1)
        text = encode_text(self.clip, tokens)
        proxies = F.normalize(self.proxies, dim=-1)
        scale = self.clip.logit_scale.clamp(max=math.log(60)).exp()
        target = chosen.repeat(PER_CONCEPT)
        loss = F.cross_entropy(scale * image @ proxies.T, target, label_smoothing=0.02)
        loss = loss + 0.5 * F.cross_entropy(scale * text @ proxies.T, chosen, label_smoothing=0.02)
        # No gradient for the texts here, nor a fresh embedding for the right one: it would
        # differ from the stale wrong ones, and be learned to differ.
        loss = loss + F.cross_entropy(scale * image @ self.bank.T, target)
        cross = scale * image @ text.T
        own = torch.arange(len(chosen)).repeat(PER_CONCEPT)
        wanted = F.one_hot(own, len(chosen)).T.float() / PER_CONCEPT
        loss = loss + 0.5 * F.cross_entropy(cross, own) + 0.5 * F.cross_entropy(cross.T, wanted)
        return loss, image.detach()


def optimiser(learner: Learner, lr: float) -> torch.optim.AdamW:
    """AdamW; no decay on vectors, a lower rate for the text tower."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in learner.named_parameters():
        text = name.startswith("clip.") and not name.startswith("clip.visual.")
        decay = 0.05 if parameter.ndim > 1 else 0.0
        groups.setdefault((0.6 if text else 1.0, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": ps, "lr": lr * factor, "base": lr * factor, "weight_decay": decay}
            for (factor, decay), ps in groups.items()
        ],
        betas=(0.9, 0.98),
        fused=True,
    )


def rate(progress: float, warm: float = 0.02) -> float:
    """Warm-up, then cosine down to nothing."""
    if progress < warm:
        return max(progress, 1e-4) / warm
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warm) / (1 - warm))))


class Average:
    """Moving average of all weights and buffers of the model."""

    def __init__(self, model: CLIP) -> None:
        """Start from the model as it is."""
        self.state = {k: v.clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: CLIP, step: int, keep: float) -> None:
        """Move towards the model; faster in the beginning."""
        keep = min(keep, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mine = self.state[name]
            if mine.is_floating_point():
                mine.lerp_(value, 1 - keep)
            else:
                mine.copy_(value)

    def model(self) -> CLIP:
        """A model with the averaged weights."""
        model = build_model()
        model.load_state_dict(self.state)
        return model.eval()


class Run:
    """A training run: what is saved, resumed, logged."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Set up, and go on from the checkpoint if there is one."""
        self.args, self.step, self.spent = args, 0, 0.0
        self.concepts = load_concepts()
        drawings = load_drawings(self.concepts, {HELD_OUT, *args.leave_out})
        self.batches = Batches(self.concepts, drawings, args.batch // THREADS)
        self.pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))
        self.learner = Learner(self.concepts)
        self.learner.to(memory_format=torch.channels_last)
        self.optimiser = optimiser(self.learner, args.lr)
        self.average = Average(self.learner.clip)
        if args.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        saved: dict[str, Any] = torch.load(self.args.checkpoint, weights_only=True)
        self.learner.load_state_dict(saved["learner"])
        bases = [group["base"] for group in self.optimiser.param_groups]
        self.optimiser.load_state_dict(saved["optimiser"])
        for group, base in zip(self.optimiser.param_groups, bases, strict=True):
            group["base"] = base
        self.average.state = saved["average"]
        self.step, self.spent = saved["step"], saved["spent"]
        print(f"going on at step {self.step}, {self.spent / 60:.1f} minutes in", flush=True)

    def save(self) -> None:
        """Write the checkpoint, replacing the last one whole."""
        partial: Path = self.args.checkpoint.with_suffix(".partial")
        saved = {
            "learner": self.learner.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.state,
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(saved, partial)
        partial.replace(self.args.checkpoint)

    def update(self) -> tuple[float, float]:
        """One step; returns loss and accuracy."""
        progress = self.spent / (self.args.minutes * 60)
        factor = rate(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = group["base"] * factor
        self.optimiser.zero_grad(set_to_none=True)
        if self.step % REFRESH == 0 or not self.learner.bank.any():
            self.learner.refresh_bank()
        strength = min(self.args.strength, 0.3 + 2 * progress)
        parts = list(self.pool.map(self._share, [strength] * THREADS))
        nn.utils.clip_grad_norm_(self.learner.parameters(), 5.0)
        self.optimiser.step()
        self.step += 1
        if self.step % 4 == 0:
            self.average.update(self.learner.clip, self.step // 4, 1 - 4 * (1 - self.args.ema))
        loss, right = np.mean(parts, axis=0)
        return float(loss), float(right)

    def _share(self, strength: float) -> tuple[float, float]:
        """One thread's share of a step: its own small batch, gradients added up."""
        images, chosen, tokens = self.batches.draw(strength)
        loss, image = self.learner(images, chosen, tokens)
        (loss / THREADS).backward()
        target = chosen.repeat(PER_CONCEPT)
        right = (image @ self.learner.bank.T).argmax(1) == target
        return loss.item(), right.float().mean().item()

    def report(self, recent: list[tuple[float, float]], seconds: float) -> None:
        """Log losses, speed and the held-out retrieval of the average."""
        loss, right = np.mean(recent, axis=0)
        line = f"{self.spent / 60:6.1f} min  step {self.step:6}  loss {loss:.3f}  acc {right:.3f}"
        speed = len(recent) * self.args.batch / seconds
        found = evaluate(self.average.model(), self.concepts)
        scores = "  ".join(
            f"{way} " + " ".join(f"{v:.3f}" for v in table.values()) for way, table in found.items()
        )
        scale = self.learner.clip.logit_scale.exp().item()
        print(f"{line}  {speed:.0f}/s  scale {scale:.1f}  held out {scores}", flush=True)

    def go(self) -> None:
        """Train until the time is spent, with regular checkpoints and reports."""
        recent: list[tuple[float, float]] = []
        last = mark = time.monotonic()
        while self.spent < self.args.minutes * 60:
            recent.append(self.update())
            now = time.monotonic()
            self.spent, last = self.spent + now - last, now
            if now - mark > self.args.every * 60:
                self.save()
                self.report(recent, now - mark)
                recent, mark = [], time.monotonic()
        self.save()
        self.report(recent or [(0.0, 0.0)], max(time.monotonic() - mark, 1e-9))


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--every", type=float, default=4.0, help="minutes between reports")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--strength", type=float, default=0.5, help="of the augmentation, up to 1")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--leave-out", nargs="*", default=[], help="styles to leave out as well")
    parser.add_argument("--checkpoint", type=Path, default=CACHE / "train.pt")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    Run(args).go()


if __name__ == "__main__":
    main()
