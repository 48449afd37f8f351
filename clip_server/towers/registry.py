"""The families of towers. A new one needs its file, and its line here."""

from __future__ import annotations

from clip_server.errors import ConfigurationError
from clip_server.towers.bert import BertText
from clip_server.towers.clip_text import ClipText
from clip_server.towers.coca_text import CocaText
from clip_server.towers.convnext import ConvNext
from clip_server.towers.eva import Eva
from clip_server.towers.fastvit import FastVit
from clip_server.towers.hybrid_vit import HybridVit
from clip_server.towers.nllb import NllbText
from clip_server.towers.resnet import ResNet
from clip_server.towers.siglip import SiglipText, SiglipVision
from clip_server.towers.timm_vit import TimmVisionTransformer
from clip_server.towers.torch_only import TorchOnlyImage, TorchOnlyText
from clip_server.towers.tower import Config, ImageTower, Shapes, TextTower, Tower
from clip_server.towers.vision_transformer import VisionTransformer
from clip_server.towers.vitamin import Vitamin

# The first that accepts a configuration builds it.
IMAGE_FAMILIES: tuple[type[ImageTower], ...] = (
    VisionTransformer,
    ResNet,
    TimmVisionTransformer,
    SiglipVision,
    Eva,
    ConvNext,
    FastVit,
    HybridVit,
    Vitamin,
)
TEXT_FAMILIES: tuple[type[TextTower], ...] = (
    ClipText,
    CocaText,
    BertText,
    SiglipText,
    NllbText,
)


def image_tower(config: Config) -> ImageTower:
    """The image tower of a configuration; `TorchOnlyImage` where no family accepts it.

    Raises:
        ConfigurationError: it is of a family, and invalid.
    """
    found = filter(None, (family.from_config(config) for family in IMAGE_FAMILIES))
    known = frozenset().union(*(family.keys for family in IMAGE_FAMILIES))
    return next(found, None) or TorchOnlyImage.from_config(config, known)


def text_tower(config: Config) -> TextTower:
    """The text tower of a configuration; `TorchOnlyText` where no family accepts it.

    Raises:
        ConfigurationError: it is of a family, and invalid.
    """
    found = filter(None, (family.from_config(config) for family in TEXT_FAMILIES))
    known = frozenset().union(*(family.keys for family in TEXT_FAMILIES))
    return next(found, None) or TorchOnlyText.from_config(config, known)


def tensor_shapes(config: Config) -> Shapes:
    """The name and shape of every tensor in a checkpoint of this architecture.

    Raises:
        ConfigurationError: only torch can build it.
    """
    dim = config["embed_dim"]
    image, text = image_tower(config).shapes(dim), text_tower(config).shapes(dim)
    return {"logit_scale": (), **image, **text}


def builds(config: Config) -> bool:
    """Whether graphs of an architecture can be built without torch."""
    try:
        tensor_shapes(config)
    except ConfigurationError:
        return False
    return True


def families() -> tuple[type[Tower], ...]:
    """Every family."""
    return *IMAGE_FAMILIES, *TEXT_FAMILIES
