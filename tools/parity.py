"""`python -m tools.parity [ARCHITECTURE ...]`: how near every runtime is to open_clip, in Markdown.

A row for each architecture, runtime and precision, at its real size, with seeded random weights
and the samples of `clip_server.convert.parity`. The reference is open_clip's own model in float32;
of Chinese-CLIP, which open_clip has not, the torch runtime, whose equality with cn_clip is a test.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from clip_server.convert.parity import Parity
from clip_server.convert.rewrite import rewrite
from clip_server.convert.writers import OnnxWriter, TorchScriptWriter
from clip_server.errors import ConfigurationError
from clip_server.model_card import PRECISIONS, ModelCard
from clip_server.models import weights, zoo
from clip_server.models.converted import TOWERS, Tower
from clip_server.runtimes.reloading import Reloadable
from clip_server.runtimes.samples import samples
from clip_server.runtimes.torch import TorchRuntime, towers
from clip_server.towers import onnx_file, registry
from clip_server.towers.tower import Shapes

# One or two of each family, with no more than 2 GB of weights.
ARCHITECTURES = (
    "ViT-B-32-quickgelu",
    "RN50-quickgelu",
    "convnext_base",
    "EVA02-B-16",
    "ViT-B-16-SigLIP",
    "MobileCLIP-S1",
    "coca_ViT-B-32",
    "CN-CLIP/RN50",
    "CN-CLIP/ViT-B-16",
    "ViT-B-16",
    "ViT-B-32-SigLIP2-256",
    "PE-Core-S-16-384",
    "ViTamin-L",
)
_LEAST_OF_BF16 = 0.999
Embeddings = dict[Tower, NDArray[np.float32]]
Row = tuple[str, str, list[Parity]]


def main() -> int:
    """Prints the table. The exit status: 0 every row is near enough, 1 one is not."""
    parser = argparse.ArgumentParser(prog="python -m tools.parity")
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    columns = ["architecture", "runtime", "precision"]
    columns += [f"{tower}: lowest cosine, largest difference" for tower in TOWERS]
    _print_row(columns)
    _print_row(["---" for _ in columns])
    near = True
    for architecture in parser.parse_args().architectures:
        with tempfile.TemporaryDirectory() as folder:
            for runtime, precision, found in _rows(architecture, Path(folder)):
                cells = [f"{each.cosine:.7f}, {each.difference:.0e}" for each in found]
                _print_row([architecture, runtime, precision, *cells])
                near &= all(_suffices(each, precision) for each in found)
        gc.collect()
    return 0 if near else 1


def _print_row(cells: list[str]) -> None:
    print("|", " | ".join(cells), "|", flush=True)


def _suffices(parity: Parity, precision: str) -> bool:
    known = next((each for each in PRECISIONS if each == precision), None)
    return parity.suffices(known) if known else parity.cosine >= _LEAST_OF_BF16


def _rows(architecture: str, folder: Path) -> Iterator[Row]:
    path = folder / "seeded.safetensors"
    card = zoo.resolve(f"{architecture}::{path}")
    expected = _saved(architecture, card, path)
    tensors = weights.read(path)  # a tokenizer, which might have to be fetched, is not needed
    for dtype in ("fp32", "bf16"):
        runtime = TorchRuntime(card, *map(Reloadable, towers(card, tensors, dtype)), "cpu", dtype)
        encode = {"image": runtime.encode_image, "text": runtime.encode_text}
        found: Embeddings = {tower: encode[tower](samples(card, tower)) for tower in TOWERS}
        expected = expected or found
        yield "torch", dtype, [Parity.of(found[tower], expected[tower]) for tower in TOWERS]
    yield _torchscript(card, tensors, folder, expected)
    yield from _onnx(card, tensors, folder, expected)


def _torchscript(
    card: ModelCard, tensors: weights.Tensors, folder: Path, expected: Embeddings
) -> Row:
    writer, path, found = TorchScriptWriter(card, tensors, "fp32"), folder / "tower.pt", []
    for tower in TOWERS:
        writer.write(tower, path)
        found.append(Parity.of(writer.open(path)(samples(card, tower)), expected[tower]))
    return "torchscript", "fp32", found


def _onnx(
    card: ModelCard, tensors: weights.Tensors, folder: Path, expected: Embeddings
) -> Iterator[Row]:
    built = registry.builds(card.config)
    for precision in PRECISIONS:
        writer, found = OnnxWriter(card, tensors, precision), []
        for tower in TOWERS:
            path, exact = folder / f"{tower}.{precision}.onnx", folder / f"{tower}.fp32.onnx"
            if built or precision == "fp32":
                writer.write(tower, path)
            else:  # what takes longest, torch's export, is done but once
                onnx_file.save(rewrite(onnx.load(exact), precision), path)
            found.append(Parity.of(writer.open(path)(samples(card, tower)), expected[tower]))
        yield f"onnx{'' if built else ', exported'}", precision, found


def _saved(architecture: str, card: ModelCard, path: Path) -> Embeddings:
    """Writes a seeded checkpoint, and gives open_clip's embeddings of the samples, if it can."""
    torch.manual_seed(0)
    if architecture.startswith("CN-CLIP/"):
        save_file(_drawn(registry.tensor_shapes(card.config)), path)
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(architecture, pretrained=None, pretrained_hf=False).eval()
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (card.image.mean, card.image.std))
    pixels = (torch.from_numpy(samples(card, "image")).float() / 255 - mean) / std
    _enliven(model, pixels)
    save_file({name: each.contiguous() for name, each in model.state_dict().items()}, path)
    with torch.inference_mode():
        tokens = torch.from_numpy(samples(card, "text")).long()
        return {
            "image": model.encode_image(pixels, normalize=False).numpy(),
            "text": model.encode_text(tokens, normalize=False).numpy(),
        }


def _enliven(model: Any, pixels: Tensor) -> None:
    """Gives effect to what is drawn with none: branches scaled by next to nothing, and batch
    norms, which get the statistics of these pixels."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gamma", "layer_scale", "bn3.weight")):
            nn.init.uniform_(parameter, 0.1, 0.5)
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the mean of all batches, here of one
        norm.train()
    if norms:
        with torch.no_grad():
            model.encode_image(pixels)
    model.eval()


def _drawn(shapes: Shapes) -> dict[str, Tensor]:
    """Weights that keep the size of what passes through them."""
    tensors = {}
    for name, shape in shapes.items():
        if name == "logit_scale":
            tensors[name] = torch.tensor(4.6)
        elif name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            tensors[name] = torch.empty(shape).uniform_(0.5, 1.5)
        else:
            inputs = int(np.prod(shape[1:])) if len(shape) > 1 else 2500
            tensors[name] = torch.randn(shape) * inputs**-0.5
    return tensors


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ConfigurationError as error:
        sys.exit(f"tools.parity: {error}")
