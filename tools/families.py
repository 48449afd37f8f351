"""Models that open_clip does not know, in the form of the server's table (see `cards`)."""

from __future__ import annotations

from typing import Any

import open_clip

_CHINESE = "CN-CLIP/"
_CHINESE_HUB = "OFA-Sys/chinese-clip-"
_CHINESE_VOCABULARY = 21128
# cn_clip's text towers.
_ROBERTA: dict[str, dict[str, Any]] = {
    "RBT3-chinese": {"width": 768, "layers": 3, "heads": 12, "mlp_width": 3072},
    "RoBERTa-wwm-ext-base-chinese": {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072},
    "RoBERTa-wwm-ext-large-chinese": {"width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
}
# cn_clip's models: the image tower, which open_clip has too, the text tower, and the end of the
# name of the hub's repository.
_CHINESE_MODELS = [
    ("RN50", "RBT3-chinese", "rn50"),
    ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese", "vit-base-patch16"),
    ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese", "vit-large-patch14"),
    ("ViT-L-14-336", "RoBERTa-wwm-ext-base-chinese", "vit-large-patch14-336px"),
    ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese", "vit-huge-patch14"),
]


def architectures() -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    return {_CHINESE + image: _chinese(image, text) for image, text, _ in _CHINESE_MODELS}


def checkpoints() -> dict[str, dict[str, Any]]:
    """Where the weights are, by canonical name, which is clip-as-service's."""
    return {
        _CHINESE + image: {
            "hub": _CHINESE_HUB + repository,
            "file": f"clip_cn_{image.lower()}.pt",
            "quick_gelu": True,
        }
        for image, _, repository in _CHINESE_MODELS
    }


def aliases() -> dict[str, str]:
    """cn_clip's names of the architectures, and the hub's of the repositories."""
    names = {f"{image}@{text}": _CHINESE + image for image, text, _ in _CHINESE_MODELS}
    return names | {_CHINESE_HUB + hub: _CHINESE + image for image, _, hub in _CHINESE_MODELS}


def _chinese(image: str, text: str) -> dict[str, Any]:
    known = open_clip.get_model_config(image)
    return {
        "embed_dim": known["embed_dim"],
        "quick_gelu": True,
        "preprocess_cfg": {"resize_mode": "squash"},
        "vision_cfg": known["vision_cfg"],
        "text_cfg": {
            "context_length": 52,
            "vocab_size": _CHINESE_VOCABULARY,
            "vocabulary": "chinese-bert",
            "bert": _ROBERTA[text] | {"vocab_size": _CHINESE_VOCABULARY},
        },
    }
