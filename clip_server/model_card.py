"""A model as preprocessing and batching see it, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ResizeMode = Literal["shortest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]
# Where the centre crop begins when an odd number of pixels is left over: the half rounded to even,
# as open_clip crops, or rounded down, as transformers does.
Crop = Literal["round", "floor"]
# How a batch of texts may be cut to its longest:
#   causal  pooled at the end token, so trailing padding cannot change the result;
#   masked  padding is masked out in attention;
#   fixed   the tower needs every position, never trim.
Trim = Literal["causal", "masked", "fixed"]
# A vocabulary bundled with the package, and its tokenizer.
Vocabulary = Literal["clip", "chinese-bert"]
# How a text is cleaned before tokenization, in open_clip's terms: `lower` and `whitespace` repair
# its encoding and collapse whitespace; `canonicalize` removes punctuation too.
Clean = Literal["lower", "whitespace", "canonicalize", "none"]
# Of a tower's weights.
Precision = Literal["fp32", "fp16", "bf16", "int8"]
# What graphs can be built in, and a model converted into.
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of images: encoded image to pixels.

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
    """Preprocessing of texts: text to token ids.

    tokenizer: where a Hugging Face `tokenizer.json` is, a repository of the hub or a folder; None
        for a bundled vocabulary.
    vocabulary: the bundled one.
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
    logit_bias: added to scaled cosines before a sigmoid, of models trained with one in place of a
        softmax, such as SigLIP; else None.
    config: the architecture in open_clip's own JSON form (`embed_dim`, `vision_cfg`,
        `text_cfg`, `quick_gelu`), from which graphs and torch modules are built.
    hub: the hub repository that holds the weights, if any.
    hub_file: their file there, where it is not one of open_clip's usual names.
    image_of: the model that the image tower and logit scale come from, if a checkpoint has only a
        text tower, as M-CLIP's: a name, or the path of a checkpoint.
    licence: of the weights, for people to read; empty if unknown.
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
    logit_bias: float | None = None
    licence: str = ""
