"""The recipe of training/README.md: open_clip's own trainer, and its checkpoint served."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import seeded
from conftest import Start, flow

from clip_client import Client
from clip_server.models import weights
from clip_server.runtimes.onnx import OnnxRuntime

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    # The trainer's tokenizer has CLIP's whole vocabulary.
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "white": (250,) * 3}
TEXTS = [f"a {colour} square" for colour in COLOURS]


def shards(folder: Path, count: int, samples: int) -> str:
    """Shards as img2dataset leaves them: for each key a .jpg, a .txt and a .json."""
    webdataset = pytest.importorskip("webdataset")
    from PIL import Image

    folder.mkdir()
    for shard in range(count):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for index in range(samples):
                colour = list(COLOURS)[index % len(COLOURS)]
                key, text = f"{shard:05d}{index:04d}", f"a {colour} square"
                picture = Image.new("RGB", (80, 64), COLOURS[colour])
                entry = {"jpg": picture, "txt": text, "json": {"caption": text, "key": key}}
                tar.write({"__key__": key, **entry})
    return f"{folder}/{{00000..{count - 1:05d}}}.tar"


def train(start: Path, data: str, samples: int, logs: Path) -> Path:
    """Runs the trainer on the CPU for one epoch; the checkpoint that it saves."""
    settings = {
        "model": f"local-dir:{start}",
        "dataset-type": "webdataset",
        "train-data": data,
        "train-num-samples": samples,
        "batch-size": 8,
        "epochs": 1,
        "lr": 1e-3,
        "warmup": 0,
        "workers": 0,
        "precision": "fp32",
        "device": "cpu",
        "logs": logs,
        "name": "recipe",
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "open_clip_train.main", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=logs.parent, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return logs / "recipe" / "checkpoints" / "epoch_1.pt"


@pytest.mark.slow
def test_the_trainers_checkpoint_is_served(start: Start, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("open_clip_train")
    model = seeded.open_clip_model(CONFIG)
    before = seeded.save(model, tmp_path / "start", CONFIG)
    data = shards(tmp_path / "shards", count=2, samples=16)
    checkpoint = train(before, data, samples=32, logs=tmp_path / "logs")
    shutil.copy(before / weights.CONFIG, checkpoint.parent)

    server = start(flow("onnx", name="mine", model_path=str(checkpoint)))
    served = Client(server.grpc).encode(TEXTS)

    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert seeded.relative(served, expected(model)) < 1e-4
    untrained = OnnxRuntime.load("mine", model_path=before)
    pixels = seeded.random_pixels(CONFIG, 2)
    assert (
        seeded.relative(untrained.encode_image(pixels), seeded.reference_images(model, pixels))
        > 0.01
    )
    assert seeded.relative(expected(seeded.open_clip_model(CONFIG)), served) > 0.01


def expected(model: Any) -> np.ndarray:
    """open_clip's own embeddings of the texts."""
    from open_clip import tokenize

    return seeded.reference_texts(model, tokenize(TEXTS).numpy())
