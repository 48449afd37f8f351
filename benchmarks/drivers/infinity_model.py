"""Writes a checkpoint as a Hugging Face CLIP folder, which infinity serves.

Runs in infinity's environment: `infinity_model.py CHECKPOINT_FOLDER VOCABULARY TARGET`.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
)
from transformers.models.clip.tokenization_clip import bytes_to_unicode

MERGES = 49152 - 256 - 2
# open_clip's names of a block's parts, and Hugging Face's.
PARTS = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
NAMES = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}
PROJECTIONS = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}


def main(source: Path, vocabulary: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    described = json.loads((source / "open_clip_config.json").read_text("utf-8"))
    model = CLIPModel(configuration(described["model_cfg"]))
    model.load_state_dict(renamed(load_file(source / "open_clip_model.safetensors")))
    model.save_pretrained(target)
    write_vocabulary(vocabulary, target)
    tokenizer = CLIPTokenizerFast(
        str(target / "vocab.json"), str(target / "merges.txt"), model_max_length=77
    )
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(target)


def configuration(described: dict[str, Any]) -> CLIPConfig:
    """open_clip's configuration of a CLIP. The rest is as in ViT-B/32, with quick gelu."""
    text, vision = described["text_cfg"], described["vision_cfg"]
    head_width = 64
    return CLIPConfig(
        projection_dim=described["embed_dim"],
        text_config=tower(text["width"], text["layers"], text["heads"]),
        vision_config=tower(vision["width"], vision["layers"], vision["width"] // head_width),
    )


def tower(width: int, layers: int, heads: int) -> dict[str, int]:
    """A tower in Hugging Face's words."""
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors under Hugging Face's names, queries, keys and values apart."""
    found = {}
    for name, tensor in tensors.items():
        if ".resblocks." in name or name.startswith("transformer.resblocks."):
            found |= block(name, tensor)
        elif name in PROJECTIONS:
            found[PROJECTIONS[name]] = tensor.T.contiguous()
        else:
            found[NAMES[name]] = tensor
    return found


def block(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of a transformer's block."""
    tower, _, rest = name.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        projections = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}self_attn.{one}_proj.{kind}": each for one, each in projections}
    module, _, kind = part.rpartition(".")
    return {f"{prefix}{PARTS[module]}.{kind}": tensor}


def write_vocabulary(vocabulary: Path, target: Path) -> None:
    """CLIP's merge table as `vocab.json` and `merges.txt`."""
    lines = gzip.decompress(vocabulary.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : MERGES + 1]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{each}</w>" for each in symbols)]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    (target / "vocab.json").write_text(json.dumps({one: i for i, one in enumerate(tokens)}))
    (target / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
