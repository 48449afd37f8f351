"""The architecture of the shipped model, and its tokenizer."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe

from training.fetch import CACHE

VOCAB_SIZE = 8192
BYTE_SYMBOLS = 512
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 2, 1], "width": 32, "head_width": 64},
    "text_cfg": {
        "context_length": 77,
        "vocab_size": VOCAB_SIZE,
        "width": 192,
        "heads": 3,
        "layers": 3,
    },
}
PREPROCESS_CFG: dict[str, Any] = {
    "mean": list(open_clip.OPENAI_DATASET_MEAN),
    "std": list(open_clip.OPENAI_DATASET_STD),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def build_model(cfg: dict[str, Any] | None = None) -> CLIP:
    """A fresh model of the given (default: the shipped) architecture."""
    return CLIP(**(cfg or MODEL_CFG))


def truncated_bpe(vocab_size: int = VOCAB_SIZE, folder: Path = CACHE) -> Path:
    """Write CLIP's merge table cut to the first merges that fit ``vocab_size``."""
    path = folder / f"bpe_{vocab_size}.txt.gz"
    if not path.exists():
        lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode("utf-8").split("\n")
        kept = lines[: 1 + vocab_size - BYTE_SYMBOLS - 2]
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(kept).encode("utf-8"), mtime=0))
    return path


@lru_cache
def build_tokenizer(vocab_size: int = VOCAB_SIZE) -> SimpleTokenizer:
    """The tokenizer with the truncated merge table."""
    tokenizer = SimpleTokenizer(bpe_path=str(truncated_bpe(vocab_size)))
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(f"the merge table gives {tokenizer.vocab_size} tokens, not {vocab_size}")
    return tokenizer
