"""Checkpoints with seeded random weights, of open_clip's own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cn_clip_reference import drawn
from numpy.typing import NDArray
from safetensors.numpy import save_file

from clip_server.models import weights
from clip_server.towers import registry

SMALL_TEXT = {"context_length": 20, "vocab_size": 600, "width": 64, "heads": 4, "layers": 3}
SMALL_VIT = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "patch_size": 16},
    "text_cfg": SMALL_TEXT,
}
# With CLIP's own tokens.
SMALL_CLIP = SMALL_VIT | {"text_cfg": SMALL_TEXT | {"vocab_size": 49408, "context_length": 77}}
SMALL_GELU = SMALL_VIT | {"quick_gelu": False}
SMALL_RESNET = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "head_width": 32},
    "text_cfg": SMALL_TEXT,
}


def open_clip_model(config: dict[str, Any], seed: int = 0) -> Any:
    """open_clip's own model, seeded; batch norms too, which torch would leave without effect."""
    import torch
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    model = CLIP(**config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "bn" in name or "downsample.1" in name:
            if name.endswith(("weight", "running_var")):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                torch.nn.init.normal_(tensor, std=0.1)
    return model


def save(model: Any, folder: Path, config: dict[str, Any]) -> Path:
    """Writes a model as open_clip's hub repositories hold them, and gives the folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    describe(folder, config)
    return folder


def save_drawn(folder: Path, config: dict[str, Any]) -> Path:
    """Writes a checkpoint without torch, with the tensors of `drawn`, and gives the folder."""
    folder.mkdir(exist_ok=True)
    save_file(drawn(registry.tensor_shapes(config)), folder / weights.CHECKPOINT)
    describe(folder, config)
    return folder


def describe(folder: Path, config: dict[str, Any]) -> None:
    """Writes the configuration that stands beside such a checkpoint."""
    described = {"model_cfg": config, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))


def random_pixels(config: dict[str, Any], batch: int, seed: int = 0) -> NDArray[np.uint8]:
    size = config["vision_cfg"]["image_size"]
    return np.random.default_rng(seed).integers(0, 256, (batch, 3, size, size), dtype=np.uint8)


def random_tokens(
    config: dict[str, Any], batch: int, longest: int, seed: int = 0
) -> NDArray[np.int32]:
    """[batch, context] with texts of 2 to `longest` ids; the first is the longest."""
    context, vocabulary = (config["text_cfg"][key] for key in ("context_length", "vocab_size"))
    rng = np.random.default_rng(seed)
    tokens = np.zeros((batch, context), dtype=np.int32)
    for index, row in enumerate(tokens):
        length = longest if index == 0 else int(rng.integers(2, longest + 1))
        row[:length] = rng.integers(1, vocabulary - 2, length)
        row[0], row[length - 1] = vocabulary - 2, vocabulary - 1
    return tokens


def reference_images(model: Any, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """open_clip's own embeddings of pixels normalised as its transform does."""
    import torch
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (
        torch.tensor(values).reshape(3, 1, 1)
        for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    with torch.inference_mode():
        scaled = torch.from_numpy(pixels).float() / 255
        return model.encode_image((scaled - mean) / std).numpy()


def reference_texts(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """open_clip's own embeddings of full-length tokens."""
    import torch

    with torch.inference_mode():
        return model.encode_text(torch.from_numpy(tokens).long()).numpy()


def relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a share of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
