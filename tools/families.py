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

_MULTILINGUAL = "M-CLIP/"
_XLM_ROBERTA_LARGE = {
    "width": 1024,
    "layers": 24,
    "heads": 16,
    "mlp_width": 4096,
    "vocab_size": 250002,
    "positions": 514,
    "first_position": 2,
    "types": 1,
    "pad_id": 1,
    "epsilon": 1e-05,
}
_LABSE = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072, "vocab_size": 501153}
# M-CLIP's models: the text tower, whose tokenizer it has, and the model whose image tower it has.
_MULTILINGUAL_MODELS = {
    "XLM-Roberta-Large-Vit-B-32": (_XLM_ROBERTA_LARGE, "xlm-roberta-large", "ViT-B-32::openai"),
    "XLM-Roberta-Large-Vit-L-14": (_XLM_ROBERTA_LARGE, "xlm-roberta-large", "ViT-L-14::openai"),
    "XLM-Roberta-Large-Vit-B-16Plus": (
        _XLM_ROBERTA_LARGE,
        "xlm-roberta-large",
        "ViT-B-16-plus-240::laion400m_e32",
    ),
    "LABSE-Vit-L-14": (_LABSE, "sentence-transformers/LaBSE", "ViT-L-14::openai"),
}
# Another spelling in clip-as-service's documentation.
_MISSPELT = {"XLM_Roberta-Large-Vit-B-32": "XLM-Roberta-Large-Vit-B-32"}


def architectures() -> dict[str, dict[str, Any]]:
    """Configurations by name."""
    chinese = {_CHINESE + image: _chinese(image, text) for image, text, _ in _CHINESE_MODELS}
    multilingual = {
        _MULTILINGUAL + name: _multilingual(*parts) for name, parts in _MULTILINGUAL_MODELS.items()
    }
    return chinese | multilingual


def checkpoints() -> dict[str, dict[str, Any]]:
    """Where the weights are, by canonical name, which is clip-as-service's."""
    multilingual = {
        _MULTILINGUAL + name: {
            "hub": _MULTILINGUAL + name,
            "file": "pytorch_model.bin",
            "image_of": image,
            "quick_gelu": image.endswith("::openai"),
        }
        for name, (_, _, image) in _MULTILINGUAL_MODELS.items()
    }
    return multilingual | {
        _CHINESE + image: {
            "hub": _CHINESE_HUB + repository,
            "file": f"clip_cn_{image.lower()}.pt",
            "quick_gelu": True,
        }
        for image, _, repository in _CHINESE_MODELS
    }


def aliases() -> dict[str, str]:
    """Other names: cn_clip's of the architectures, Immich's, the hub's of the repositories."""
    immich = {name: _MULTILINGUAL + name for name in _MULTILINGUAL_MODELS}
    misspelt = {_MULTILINGUAL + name: _MULTILINGUAL + right for name, right in _MISSPELT.items()}
    names = {f"{image}@{text}": _CHINESE + image for image, text, _ in _CHINESE_MODELS}
    hubs = {_CHINESE_HUB + hub: _CHINESE + image for image, _, hub in _CHINESE_MODELS}
    return misspelt | immich | names | hubs


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


def _multilingual(bert: dict[str, Any], tokenizer: str, image: str) -> dict[str, Any]:
    known = open_clip.get_model_config(image.partition("::")[0])
    return {
        "embed_dim": known["embed_dim"],
        "vision_cfg": known["vision_cfg"],
        "text_cfg": {
            "context_length": 77,  # as clip-as-service cut them
            "vocab_size": bert["vocab_size"],
            "hf_tokenizer_name": tokenizer,
            "tokenizer_kwargs": {"clean": "none"},
            "bert": {
                **bert,
                "pool": "mean",
                "prefix": "transformer.",
                "projection": "LinearTransformation",
                "projection_bias": True,
            },
        },
    }
