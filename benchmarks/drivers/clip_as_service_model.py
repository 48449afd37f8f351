"""Writes clip-as-service's pair of ONNX graphs for a checkpoint, as its authors made theirs.

Runs in the environment of clip-as-service: `clip_as_service_model.py CHECKPOINT_FOLDER TARGET`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import onnx
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file


class Textual(torch.nn.Module):
    """The text tower alone: [B, 77] int32 to [B, D]."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(input_ids.long())


def main(source: Path, target: Path) -> None:
    config = json.loads((source / "open_clip_config.json").read_text("utf-8"))["model_cfg"]
    model = CLIP(**config).eval()
    model.load_state_dict(load_file(source / "open_clip_model.safetensors"), strict=False)
    target.mkdir(parents=True, exist_ok=True)
    size = config["vision_cfg"]["image_size"]
    pixels = torch.zeros(2, 3, size, size)
    tokens = torch.zeros(2, config["text_cfg"]["context_length"], dtype=torch.int32)
    export(model.visual, pixels, "pixel_values", target / "visual.onnx")
    export(Textual(model), tokens, "input_ids", target / "textual.onnx")
    feed_mask(target / "textual.onnx")


def export(tower: torch.nn.Module, example: torch.Tensor, name: str, file: Path) -> None:
    torch.onnx.export(
        tower,
        (example,),
        str(file),
        input_names=[name],
        output_names=["output"],
        dynamic_axes={name: {0: "batch"}, "output": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )


def feed_mask(file: Path) -> None:
    """Adds the input `attention_mask`, which clip-as-service feeds and CLIP does not use."""
    model = onnx.load(file)
    mask = onnx.ValueInfoProto()
    mask.CopyFrom(model.graph.input[0])
    mask.name = "attention_mask"
    model.graph.input.append(mask)
    onnx.save(model, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
