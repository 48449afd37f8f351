"""Write the averaged weights of a checkpoint as the files the service loads.

Run as ``python -m training.export``; overwrites ``clip_server/models/embedded``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from training.evaluate import EXPORTED
from training.fetch import CACHE
from training.model import MODEL_CFG, PREPROCESS_CFG, build_model

MAX_BYTES = 20_000_000


def averaged_model(*checkpoints: Path) -> CLIP:
    """The model with the moving average of the weights in a checkpoint, or with the mean of
    those in several that were fitted from the same start (Wortsman et al. 2022, "Model soups").
    """
    states = [torch.load(path, weights_only=True)["average"] for path in checkpoints]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    model = build_model()
    model.load_state_dict(mean)
    return model.eval()


def export(model: CLIP, folder: Path = EXPORTED) -> int:
    """Write fp16 weights and configuration; returns the size of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    partial = folder / "open_clip_model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    size = partial.stat().st_size
    if size >= MAX_BYTES:
        raise ValueError(f"the weights take {size} bytes, more than {MAX_BYTES}")
    partial.replace(folder / "open_clip_model.safetensors")
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "open_clip_config.json").write_text(text, encoding="utf-8")
    return size


def main() -> None:
    """Export the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=[CACHE / "aligned_0.pt", CACHE / "aligned_1.pt"],
    )
    parser.add_argument("--out", type=Path, default=EXPORTED)
    args = parser.parse_args()
    size = export(averaged_model(*args.checkpoint), args.out)
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
