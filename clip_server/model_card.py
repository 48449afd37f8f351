"""What preprocessing and batching need to know of a model, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

ResizeMode = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
# Where the centre begins when an odd number of pixels is left over: to the nearest even one, as
# open_clip crops, or to the one before, as transformers does.
Crop = Literal["round", "floor"]
# How a batch of texts may be cut to its longest:
#   causal  pooled at the end token, so trailing padding cannot change the result;
#   masked  padding is masked out in attention;
#   fixed   the tower needs every position, never trim.
Trim = Literal["causal", "masked", "fixed"]
# A vocabulary that comes with the package, and the tokenizer that goes with it.
Vocabulary = Literal["clip", "chinese-bert"]
# What is done to a text before its tokens are looked up, in open_clip's words: `lower` and
# `whitespace` mend it and make every gap one space; `canonicalize` removes punctuation too.
Clean = Literal["lower", "whitespace", "canonicalize", "none"]
# What graphs can be built in, and a model converted into.
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes pixels.

    size: side of the square the tower takes, in pixels.
    mean, std: per channel (RGB), of pixel values scaled to 0..1.
    resize: `shortest` scales the shorter side to `size` and crops the centre; `squash`
        scales both sides to `size`.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resize: ResizeMode = "shortest"
    interpolation: Interpolation = "bicubic"
    crop: Crop = "round"


@dataclass(frozen=True)
class TextSpec:
    """How a text becomes tokens.

    tokenizer: None for a vocabulary that comes with the package; else where a Hugging Face
        `tokenizer.json` is, a repository of the hub or a folder.
    vocabulary: which, where `tokenizer` is None.
    vocab_size: entries of the vocabulary that the model knows; with CLIP's own, fewer than its
        49,408 keep the first merges.
    strip_separator: a Hugging Face tokenizer's separator becomes id 0, as CLIPA was trained.
    """

    tokenizer: str | None = None
    context_length: int = 77
    vocab_size: int = 49408
    pad_id: int = 0
    trim: Trim = "causal"
    clean: Clean = "lower"
    strip_separator: bool = False
    vocabulary: Vocabulary = "clip"


@dataclass(frozen=True)
class ModelCard:
    """A model as the service sees it.

    name: the canonical name, `architecture::tag`.
    dim: length of an embedding.
    logit_scale: the factor on cosines before a softmax, exp() already taken.
    config: the architecture in open_clip's own JSON form (`embed_dim`, `vision_cfg`,
        `text_cfg`, `quick_gelu`), from which graphs and torch modules are built.
    hub: the hub repository that holds the weights, if any.
    hub_file: their file there, where it is not one of open_clip's usual names.
    image_of: the model whose image tower and logit scale go with a checkpoint that has a text
        tower alone, as M-CLIP's: a name, or the path of a checkpoint.
    licence: of the weights, for people to read; empty where it is not known.
    """

    name: str
    dim: int
    image: ImageSpec
    text: TextSpec
    logit_scale: float
    config: dict[str, Any]
    hub: str | None = None
    hub_file: str | None = None
    image_of: str | None = None
    licence: str = ""
